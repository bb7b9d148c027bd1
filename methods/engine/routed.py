"""Attach a method to an untouched Hugging Face model, and take it off again.

`routed` swaps the `forward` of the decoder and of its layers; weights, classes and everything else
stay as they are, so `generate`, lm-eval and hooks on layers keep working. Each unit is handed to an
*executor* as a `Unit`: the residual stream, the normalised input, and how to run the real
computation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from methods.base import Method, Site
from methods.engine.cache.forecast_keys import forecast_keys
from methods.engine.decoder.families import shape_of, windows_of
from methods.engine.decoder.placement import place_on_devices, placed, spread
from methods.engine.decoder.swap import Executor, swapped
from methods.engine.execute.gathered import GatheredExecutor
from methods.engine.execute.masked import MaskedExecutor
from methods.engine.lora import applied
from methods.engine.measure.counters import Counters
from methods.engine.ops.choose import Kernels, row_ops
from methods.engine.ops.row_ops import MODULES
from methods.engine.routing import Routing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Mode = Literal["masked", "gathered"]
EXECUTORS: dict[str, Callable[[Routing], Executor]] = {
    "masked": MaskedExecutor,
    "gathered": GatheredExecutor,
}


@contextmanager
def routed(
    model: PreTrainedModel, method: Method, mode: Mode = "masked", *, kernels: Kernels = "auto"
) -> Iterator[Any]:
    """Route `model` with `method` inside the block; the model is restored on any exit.

    Args:
        model: a causal LM of a supported family, weights untouched.
        method: already set up for the model's shape (`attach` does that).
        mode: `masked` computes every token and blends; `gathered` computes what is executed.
        kernels: of `gathered`; `auto` takes fused Triton kernels on CUDA, and loops compiled by the
            C compiler that is there on a CPU, else PyTorch.

    Yields:
        The same model object, with `model.routing` (a `Routing`) set. Of several threads that use
        it, one at a time runs a forward call.

    Raises:
        UnsupportedModel: no adapter for the family.
        ValueError: unknown mode, a model that is already routed, a site outside the model, fused
            kernels asked for where `device_map` has placed the model.
    """
    if mode not in EXECUTORS:
        raise ValueError(f"mode must be one of {', '.join(EXECUTORS)}, not {mode!r}")
    if getattr(model, "routing", None) is not None:
        raise ValueError("this model is already routed; leave the first `routed` block before")
    shape = shape_of(model.config)
    known = {*shape.units(), *(Site(layer, "block") for layer in range(shape.layers))}
    sites = frozenset(method.sites())
    if sites - known:
        raise ValueError(f"sites outside the model: {sorted(sites - known)}")
    fixed = method.fixed()
    dropped = frozenset(site for site, runs in fixed.items() if not runs)
    ops = row_ops(kernels, model) if mode == "gathered" else MODULES
    if placed(model):
        kernels = _without_fused(kernels)
    counters = Counters(shape, dropped, spread(model), windows_of(model.config))
    routing = Routing(method=method, counters=counters, kernels=kernels, ops=ops)
    executor = EXECUTORS[mode](routing)
    with (
        # offloaded weights are at hand from here on, for adapters that read them
        swapped(model, sites - fixed.keys(), executor, routing, dropped=dropped, ops=ops),
        applied(method.adapter),
        forecast_keys(model, method, routing.attending),
    ):
        model.routing = routing  # type: ignore[assignment]
        try:
            yield model
        finally:
            del model.routing


def _without_fused(kernels: Kernels) -> Kernels:
    """Fused kernels run on one device, over weights that are there."""
    if kernels == "triton":
        raise ValueError("kernels=triton needs the whole model on one GPU: leave device_map out")
    return "torch"


def attach(model: PreTrainedModel, method: Method) -> Method:
    """Create the method's modules for this model and put them where its layers are."""
    method.setup(shape_of(model.config))
    return place_on_devices(model, method)
