"""Attach a method to an untouched Hugging Face model, and take it off again.

`routed` swaps the decoder layers' `forward`; weights, classes and everything else stay as they
are, so `generate`, lm-eval and hooks keep working. Each unit is handed to an *executor* as a
`Unit`: the residual stream, the normalised input, and how to run the real computation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import torch
from torch import Tensor

from methods.base import BrokenContract, Decision, Method, RouteContext, Site
from methods.engine.cache.forecast_keys import forecast_keys
from methods.engine.decoder.adapter import decoder, shape_of
from methods.engine.decoder.forward import ForwardState
from methods.engine.decoder.placement import placed, settle, spread
from methods.engine.decoder.swap import Executor, swapped
from methods.engine.decoder.unit import Unit
from methods.engine.lora import applied, suspended
from methods.engine.measure.clock import Clock, NoClock
from methods.engine.measure.counters import Counters
from methods.engine.ops.choose import Kernels, row_ops
from methods.engine.ops.row_ops import MODULES, RowOps

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Mode = Literal["masked", "gathered"]


@dataclass
class Routing:
    """State of a routed model; found as `model.routing` while `routed` is active."""

    method: Method
    counters: Counters
    state: ForwardState = field(default_factory=ForwardState)
    training: bool = False
    """True makes methods sample and gates carry gradient."""
    anneal: float = 0.0
    target: float | None = None
    """Sparsity that a training step aims at."""
    paused: bool = False
    """True runs the dense model, for a teacher's logits in the middle of training."""
    observer: Callable[[Site, Decision, Tensor], None] | None = None
    """Called with (site, decision, valid_BT) after each decision."""
    kernels: Kernels = "auto"
    """Fused Triton kernels on CUDA and compiled loops on a CPU (auto), one of them or none."""
    ops: RowOps = field(default_factory=RowOps)
    """Row-wise work between matrix products."""
    clock: Clock = field(default_factory=NoClock)
    """Told what the gathered path is about to do."""
    draw: Callable[[Site, Tensor], Tensor] | None = None
    """(site, valid_BT) -> execute_BT instead of the router's decision, to time any sparsity."""
    unit_observer: Callable[[Unit, Decision, Tensor], None] | None = None
    """Called by the masked path with (unit, decision, residual stream after execution)."""
    decisions: dict[Site, Decision] = field(default_factory=dict)
    """Decisions of the last training forward, with gradient."""
    attending: dict[int, Tensor] = field(default_factory=dict)
    """execute_BT of each layer's attention in this forward."""

    @property
    def watched(self) -> bool:
        """True if somebody reads decisions as they are made."""
        return self.observer is not None or self.unit_observer is not None

    def decide(self, unit: Unit) -> Decision:
        """Ask the method; padding is bypassed. The executor counts what it executes."""
        valid, positions = self.state.valid_BT, self.state.positions_BT
        assert valid is not None and positions is not None
        context = RouteContext(
            unit.residual_BTD,
            positions,
            valid,
            self.training,
            self.anneal,
            self.target,
            output=lambda: unit.run() - unit.residual_BTD,
            memory=self.state.memory,
        )
        decision = self.method.route(unit.site, unit.x_BTD, context)
        self._check(unit.site, decision, valid)
        decision.execute_BT = self.settle(unit, decision.execute_BT)
        if self.training:
            self.decisions[unit.site] = decision
        if self.observer is not None:
            self.observer(unit.site, decision, valid)
        return decision

    def approximate(self, site: Site, x: Tensor) -> Tensor | None:
        """Ask the method for what bypassed tokens get, in the shape of `x` [B, T, D]."""
        estimate = self.method.approximate(site, x)
        if estimate is not None and estimate.shape != x.shape:
            self._refuse(site, f"approximate() gave {list(estimate.shape)}, not {list(x.shape)}")
        return estimate

    def _check(self, site: Site, decision: Decision, valid_BT: Tensor) -> None:
        """Refuse what would be broadcast over the batch, or is no decision, in one line."""
        if not isinstance(decision, Decision):
            kind = type(decision).__name__
            self._refuse(site, f"route() gave a {kind}: return self.decide(scores_BT)")
        if decision.execute_BT.dtype != torch.bool:
            self._refuse(site, f"route() gave execute_BT in {decision.execute_BT.dtype}, not bool")
        for name in ("execute_BT", "gate_BT", "scores_BT", "scale_BT"):
            value: Tensor | None = getattr(decision, name)
            if value is not None and value.shape != valid_BT.shape:
                given, wanted = list(value.shape), list(valid_BT.shape)
                self._refuse(site, f"route() gave {name} of shape {given}, not [B, T] = {wanted}")

    def _refuse(self, site: Site, what: str) -> NoReturn:
        raise BrokenContract(f"{type(self.method).__name__} at {site.key}: {what}")

    def settle(self, unit: Unit, execute_BT: Tensor) -> Tensor:
        """What is executed: a draw instead of the decision if there is one, and no padding."""
        assert self.state.valid_BT is not None
        if self.draw is not None:
            execute_BT = self.draw(unit.site, self.state.valid_BT)
        if self.state.mask is not None:
            execute_BT = execute_BT & self.state.valid_BT
        if unit.attends:
            self.attending[unit.site.layer] = execute_BT
        return execute_BT

    def reset_counters(self) -> None:
        """Start counting anew."""
        counted = self.counters
        self.counters = Counters(counted.shape, counted.dropped, counted.spread)

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Run the untouched computation inside the block."""
        self.paused = True
        try:
            with suspended(self.method.adapter):
                yield
        finally:
            self.paused = False


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
        The same model object, with `model.routing` (a `Routing`) set.

    Raises:
        UnsupportedModel: no adapter for the family.
        ValueError: unknown mode, a model that is already routed, a site outside the model, fused
            kernels asked for where `device_map` has placed the model.
    """
    from methods.engine.execute.gathered import GatheredExecutor
    from methods.engine.execute.masked import MaskedExecutor

    executors: dict[str, Callable[[Routing], Executor]] = {
        "masked": MaskedExecutor,
        "gathered": GatheredExecutor,
    }
    if mode not in executors:
        raise ValueError(f"mode must be one of {', '.join(executors)}, not {mode!r}")
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
    counters = Counters(shape, dropped, spread(model))
    routing = Routing(method=method, counters=counters, kernels=kernels, ops=ops)
    executor, asked = executors[mode](routing), sites - fixed.keys()
    with (
        applied(method.adapter),
        forecast_keys(model, method, lambda layer: _attending(routing, layer)),
        swapped(
            model,
            asked,
            executor,
            routing.state,
            paused=lambda: routing.paused,
            dropped=dropped,
            ops=ops,
        ),
    ):
        stack = decoder(model)
        hooks = [
            stack.register_forward_pre_hook(lambda *_: _start_count(routing)),
            stack.register_forward_hook(lambda *_: _end_count(routing)),
        ]
        model.routing = routing  # type: ignore[assignment]
        try:
            yield model
        finally:
            for hook in hooks:
                hook.remove()
            del model.routing


def _without_fused(kernels: Kernels) -> Kernels:
    """Fused kernels run on one device, over weights that are there."""
    if kernels == "triton":
        raise ValueError("kernels=triton needs the whole model on one GPU: leave device_map out")
    return "torch"


def _attending(routing: Routing, layer: int) -> Tensor | None:
    return None if routing.paused else routing.attending.get(layer)


def _start_count(routing: Routing) -> None:
    routing.attending.clear()
    if not routing.paused:
        assert routing.state.valid_BT is not None and routing.state.positions_BT is not None
        routing.counters.start_forward(routing.state.valid_BT, routing.state.positions_BT)


def _end_count(routing: Routing) -> None:
    routing.state.memory.clear()
    if not routing.paused:
        routing.counters.end_forward()


def attach(model: PreTrainedModel, method: Method) -> Method:
    """Create the method's modules for this model and put them where its layers are."""
    method.setup(shape_of(model.config))
    return settle(model, method)


def routing_of(model: PreTrainedModel) -> Routing:
    """The state of the `routed` block that the model is in.

    Raises:
        ValueError: the model is not routed now.
    """
    routing = getattr(model, "routing", None)
    if not isinstance(routing, Routing):
        raise ValueError("this model is not inside a `routed` block")
    return routing
