"""The state of a routed model: who decides, what was counted, and who looks on."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from methods.base import BrokenContract, Decision, Method, RouteContext, Site
from methods.engine.decoder.inputs import ForwardCall, capturing
from methods.engine.decoder.neurons import weights_of
from methods.engine.decoder.swap import DecoderState
from methods.engine.decoder.unit import Unit
from methods.engine.lora import suspended
from methods.engine.measure.clock import UNTIMED, Bench
from methods.engine.measure.counters import Counters
from methods.engine.ops.choose import Kernels
from methods.engine.ops.row_ops import RowOps

if TYPE_CHECKING:
    from transformers import PreTrainedModel


log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Routing(DecoderState):
    """State of a routed model; found as `model.routing` while `routed` is active."""

    method: Method
    counters: Counters
    training: bool = False
    """True makes methods sample and gates carry gradient."""
    anneal: float = 0.0
    target: float | None = None
    """Sparsity that a training step aims at."""
    observer: Callable[[Site, Decision, Tensor], None] | None = None
    """Called with (site, decision, valid_BT) after each decision."""
    unit_observer: Callable[[Unit, Decision, Tensor], None] | None = None
    """Called by the masked path with (unit, decision, residual stream after execution)."""
    kernels: Kernels = "auto"
    """Fused Triton kernels on CUDA and compiled loops on a CPU (auto), one of them or none."""
    ops: RowOps = field(default_factory=RowOps)
    """Row-wise work between matrix products."""
    bench: Bench | None = None
    """A benchmark's clock, and decisions of its own to time any sparsity."""
    check: Callable[[ForwardCall], None] = lambda call: None
    """Raises before a forward call that the block would answer wrongly."""
    decisions: dict[Site, Decision] = field(default_factory=dict)
    """Decisions of the last training forward, with gradient."""
    first_call: bool = True
    """True until a forward call has ended."""

    @property
    def watched(self) -> bool:
        """True if somebody reads decisions as they are made."""
        return self.observer is not None or self.unit_observer is not None

    @property
    def drawn(self) -> bool:
        """True if a benchmark decides instead of the router."""
        return self.bench is not None and self.bench.draw is not None

    def part(self, name: str) -> AbstractContextManager[None]:
        """Time the block under a name, if a benchmark wants to know."""
        return UNTIMED if self.bench is None else self.bench.part(name)

    def started(self, call: ForwardCall) -> None:
        """Open the count of a forward call."""
        self.check(call)
        if not self.drawn:
            call.reserve(self.method.reserved)
        self.counters.start_forward(call.valid_BT, call.positions_BT)

    def ended(self) -> None:
        """Close it, and drop what the method kept for this call."""
        self.call.memory.clear()
        self.counters.end_forward()
        if self.first_call and not (self.watched or self.training or capturing()):
            self._say_uncalibrated()
        self.first_call = False

    def _say_uncalibrated(self) -> None:
        """Warn of a method that executes everything because nobody has set its threshold."""
        method = self.method
        if method.sparsity == 0.0 or float(method.threshold) != -math.inf:
            return
        if self.counters.read().sparsity() == 0.0:
            name = type(method).__name__
            log.warning(
                "%s was never calibrated: sparsity %g was asked for, and every token executes "
                "everything (calibrate it, or load one that was saved)",
                *(name, method.sparsity),
            )

    def decide(self, unit: Unit) -> Decision:
        """Ask the method; reserved tokens are executed, whatever it says, and padding is bypassed.

        The executor counts what it executes.
        """
        call = unit.inputs.call
        decision = self.method.route(unit.site, unit.x_BTD, self._context(unit))
        self._check(unit.site, decision, call.valid_BT)
        decision.execute_BT = self.apply_mask(unit, decision.execute_BT)
        if call.reserved_BT is not None:
            _reserve(decision, call.reserved_BT)
        if self.training:
            self.decisions[unit.site] = decision
        if self.observer is not None:
            self.observer(unit.site, decision, call.valid_BT)
        return decision

    def apply_mask(self, unit: Unit, execute_BT: Tensor) -> Tensor:
        """What is executed: reserved tokens too, or a draw instead of all that; and no padding."""
        call = unit.inputs.call
        if self.bench is not None and self.bench.draw is not None:
            execute_BT = self.bench.draw(unit.site, call.valid_BT)
        elif call.reserved_BT is not None:
            execute_BT = execute_BT | call.reserved_BT
        if call.mask is not None:
            execute_BT = execute_BT & call.valid_BT
        if unit.attends:
            call.attending[unit.site.layer] = execute_BT
        return execute_BT

    def approximate(self, site: Site, x: Tensor) -> Tensor | None:
        """Ask the method for what bypassed tokens get, in the shape of `x` [B, T, D]."""
        return self._shaped(site, "approximate", self.method.approximate(site, x), x)

    def estimated(self, unit: Unit) -> Tensor:
        """Residual stream after a site of `Method.estimated`, [B, T, D]."""
        given = self.method.estimate(unit.site, unit.x_BTD, self._context(unit))
        estimate = self._shaped(unit.site, "estimate", given, unit.x_BTD)
        return unit.residual_BTD if estimate is None else unit.residual_BTD + estimate

    def _context(self, unit: Unit) -> RouteContext:
        call = unit.inputs.call
        return RouteContext(
            unit.residual_BTD,
            call.positions_BT,
            call.valid_BT if call.asked_BT is None else call.asked_BT,
            self.training,
            self.anneal,
            self.target,
            output=lambda: unit.run() - unit.residual_BTD,
            layer_input_BTD=unit.layer_input_BTD,
            swiglu=lambda: weights_of(unit.part),
            memory=call.memory,
        )

    def _shaped(self, site: Site, asked: str, estimate: Tensor | None, x: Tensor) -> Tensor | None:
        """Refuse an estimate that would be broadcast over tokens."""
        if estimate is not None and estimate.shape != x.shape:
            self._refuse(site, f"{asked}() gave {list(estimate.shape)}, not {list(x.shape)}")
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
            shape = valid_BT.shape
            if name == "scale_BT" and value is not None and value.dim() == 3:
                shape = torch.Size([*shape, self.counters.shape.width])
            if value is not None and value.shape != shape:
                given, wanted = list(value.shape), list(shape)
                axes = "[B, T, D]" if len(shape) == 3 else "[B, T]"
                self._refuse(site, f"route() gave {name} of shape {given}, not {axes} = {wanted}")

    def _refuse(self, site: Site, what: str) -> NoReturn:
        raise BrokenContract(f"{type(self.method).__name__} at {site.key}: {what}")

    def attending(self, layer: int) -> Tensor | None:
        """execute_BT of a layer's attention in this forward call; None runs it densely."""
        return None if self.paused else self.call.attending.get(layer)

    def reset_counters(self) -> None:
        """Start counting anew."""
        self.counters = self.counters.anew()

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Run the untouched computation inside the block, while other threads wait."""
        with self.lock:
            self.paused = True
            try:
                with suspended(self.method.adapter):
                    yield
            finally:
                self.paused = False


def _reserve(decision: Decision, reserved_BT: Tensor) -> None:
    """Give reserved tokens the unit's own output, without gradient, and a score above any other.

    So no threshold lies among theirs, and no gate that scales reaches the attention sink.
    """
    decision.gate_BT = decision.gate_BT.masked_fill(reserved_BT, 1.0)
    decision.scores_BT = decision.scores_BT.masked_fill(reserved_BT, math.inf)
    scale = decision.scale_BT
    if scale is not None:
        reserved = reserved_BT if scale.dim() == 2 else reserved_BT[..., None]
        decision.scale_BT = scale.masked_fill(reserved, 1.0)


def routing_of(model: PreTrainedModel) -> Routing:
    """Return the state of the `routed` block that the model is in.

    Raises:
        ValueError: the model is not routed now.
    """
    routing = getattr(model, "routing", None)
    if not isinstance(routing, Routing):
        raise ValueError("this model is not inside a `routed` block")
    return routing
