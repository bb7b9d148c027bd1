"""Attach a method to an untouched Hugging Face model, and take it off again.

`routed` swaps the `forward` of the decoder and of its layers; weights, classes and everything else
stay as they are, so `generate`, lm-eval and hooks keep working (on attention and MLP modules in
mode `masked` only, where they are called). Each unit is handed to an *executor* as a `Unit`: the
residual stream, the normalised input, and how to run the real computation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from methods.base import BrokenContract, Decision, KVPolicy, Method, RouteContext, Site
from methods.engine.cache.forecast_keys import forecast_keys, require_apart
from methods.engine.decoder.families import (
    LayerParts,
    UnsupportedModel,
    layers_of,
    require_family,
    shape_of,
    windows_of,
)
from methods.engine.decoder.inputs import ForwardCall
from methods.engine.decoder.placement import input_device, place_on_devices, placed, spread
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
        it, one at a time runs a forward call. It cannot be copied or pickled inside the block.

    Raises:
        UnsupportedModel: no adapter for the family.
        BrokenContract: `estimated` is not among what `fixed` bypasses.
        ValueError: unknown mode, a model that is already routed, a site outside the model, fused
            kernels asked for where `device_map` has placed the model; from a forward call,
            attention maps, masks, implementations or hooks that the mode cannot follow.
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
    estimated = frozenset(method.estimated())
    if estimated - dropped:
        wrong = ", ".join(site.key for site in sorted(estimated - dropped))
        raise BrokenContract(
            f"{type(method).__name__}: estimated() names {wrong}, which fixed() does not bypass"
        )
    ops = row_ops(kernels, model) if mode == "gathered" else MODULES
    if placed(model):
        kernels = _without_fused(kernels)
    counters = Counters(shape, dropped, estimated, spread(model), windows_of(model.config))
    routing = Routing(method=method, counters=counters, kernels=kernels, ops=ops)
    routing.check = partial(_check, model, layers_of(model), mode, method.kv_policy, dropped)
    executor = EXECUTORS[mode](routing)
    with (
        # offloaded weights are at hand from here on, for adapters that read them
        swapped(
            model, (sites - fixed.keys()) | estimated, executor, routing, dropped=dropped, ops=ops
        ),
        applied(method.adapter),
        forecast_keys(model, method, routing.attending),
    ):
        model.routing = routing  # type: ignore[assignment]
        try:
            yield model
        finally:
            del model.routing


def _check(
    model: PreTrainedModel,
    parts: Sequence[LayerParts],
    mode: Mode,
    kv_policy: str,
    dropped: frozenset[Site],
    call: ForwardCall,
) -> None:
    """Refuse, in one line, what a forward call asks for and this block would answer wrongly."""
    gathers = mode == "gathered"
    if gathers and any(_hooked(part) for part in parts):
        raise ValueError(
            "mode=gathered calls no attention or MLP module, so that its forward hooks would not "
            "run: use mode=masked, or hooks on layers, norms and projections"
        )
    away = any(unit.kind == "attention" for site in dropped for unit in site.units)
    asked = call.attentions or model.config.output_attentions
    if asked and (gathers or away):
        raise ValueError("output_attentions=True needs mode=masked and attention in every layer")
    implementation = model.config._attn_implementation
    if (gathers or kv_policy == "evict") and implementation not in ("sdpa", "eager"):
        raise ValueError(
            "mode=gathered and KV policy evict need attn_implementation sdpa or eager, "
            f"not {implementation}"
        )
    if kv_policy == "evict" and not call.only_padding:
        raise ValueError("KV policy evict needs an attention_mask of padding, [batch, keys]")


def _hooked(part: LayerParts) -> bool:
    """True if somebody's hooks wait for a call that the gathered path does not make."""
    modules = (part.attention, part.mlp)
    tables = (table for m in modules for table in (m._forward_hooks, m._forward_pre_hooks) if table)
    hooks = (hook for table in tables for hook in table.values())
    # transformers leaves its own in place once it has recorded outputs; they do nothing
    return any(getattr(h, "__module__", "") != "transformers.utils.output_capturing" for h in hooks)


def _without_fused(kernels: Kernels) -> Kernels:
    """Fused kernels run on one device, over weights that are there."""
    if kernels == "triton":
        raise ValueError("kernels=triton needs the whole model on one GPU: leave device_map out")
    return "torch"


def attach(model: PreTrainedModel, method: Method) -> Method:
    """Create the method's modules for this model and put them where its layers are.

    Raises:
        UnsupportedModel: no adapter for the family, or one that gives other numbers.
        ValueError: the method does not fit the model.
    """
    method.setup(shape_of(model.config))
    if method.kv_policy == "forecast":
        require_apart(layers_of(model)[0].attention)
    require_equal(model)
    return place_on_devices(model, method)


class _Everything(Method):
    """Routes every unit and bypasses none."""

    def route(self, site: Site, x_BTD: Tensor, ctx: RouteContext) -> Decision:
        return self.decide(torch.ones(x_BTD.shape[:2], device=x_BTD.device))


CHECKED_TOKENS = 8
_EQUAL: set[tuple[str, ...]] = set()
"""Models that were found equal, by class, precision, config and family."""


@torch.no_grad()
def require_equal(model: PreTrainedModel) -> None:
    """Compare a forward with nothing bypassed with the untouched model's, once for each config.

    A family whose line is wrong, or whose code has changed, runs and gives other numbers. Weights
    that are not there (of a plan, or offloaded, which would all be fetched) are not asked.

    Raises:
        UnsupportedModel: they differ.
    """
    family = require_family(model.config.model_type)
    key = (type(model).__name__, str(model.dtype), model.config.to_json_string(), repr(family))
    there = all(weight.device.type != "meta" for weight in model.parameters())
    if key in _EQUAL or not there or getattr(model, "routing", None) is not None:
        return
    trained, device = model.training, input_device(model)
    ids = torch.arange(1, CHECKED_TOKENS + 1, device=device)[None] % model.config.vocab_size
    model.eval()
    try:
        dense = model(input_ids=ids).logits.float()
        for mode, policy, tolerance in _trials(model):
            everything = _Everything(sparsity=0.0)
            everything.kv_policy = policy
            everything.setup(shape_of(model.config))
            with routed(model, everything, mode):
                found = model(input_ids=ids).logits.float()
            error = float((found - dense).abs().max() / dense.abs().max())
            if not error <= tolerance:
                raise UnsupportedModel(
                    f"the adapter of {model.config.model_type} gives other numbers than the model: "
                    f"logits differ by {error:.1e} of the largest in mode {mode} with nothing "
                    "bypassed (its line in methods/engine/decoder/families.py)"
                )
    finally:
        model.train(trained)
    _EQUAL.add(key)


def _trials(model: PreTrainedModel) -> list[tuple[Mode, KVPolicy, float]]:
    """Mode, KV policy and tolerance: masked runs the model's own modules.

    Under `evict` gathered execution computes attention itself though nothing is bypassed; where
    rounding differs, an expert may be another, so that only float32 is compared.
    """
    own: list[tuple[Mode, KVPolicy, float]] = [("masked", "keep", 1e-2)]
    sure = model.dtype == torch.float32 and not any(map(_hooked, layers_of(model)))
    if sure and model.config._attn_implementation in ("sdpa", "eager"):
        own.append(("gathered", "evict", 1e-3))
    return own
