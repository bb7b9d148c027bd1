"""Decoding one sequence on the host: a number decides, and a bypassed unit costs next to nothing.

With one token a forward is bound by the bytes of its weights and by the number of its operations,
so that this path calls as few as it can.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from methods.base import LinearUnit, Site
from methods.engine.decoder.unit import Unit
from methods.engine.execute.linear_sites import LinearSites
from methods.engine.execute.one_query import OneMlp, OneQuery, Rotation
from methods.engine.ops.linear import estimate
from methods.engine.routed import Routing


@dataclass(slots=True)
class _Known:
    """A unit read once: how it decides, estimates and executes."""

    linear: LinearUnit
    offset: float
    attention: OneQuery | None
    mlp: OneMlp | None


class OneToken:
    """Runs the units of one token where the method is linear and the model plain, else declines."""

    def __init__(self, routing: Routing, linear: LinearSites) -> None:
        self.routing, self.linear = routing, linear
        self._known: dict[Site, _Known | None] = {}
        self._answers = {value: torch.tensor([[value]]) for value in (True, False)}
        self._rotation = Rotation()

    def forget(self) -> None:
        """The weights may have changed."""
        self._known.clear()

    def __call__(self, unit: Unit) -> Tensor | None:
        """Residual stream after the unit, [1, 1, D]; None if this path does not apply."""
        routing, site, inputs = self.routing, unit.site, unit.inputs
        if site not in self._known:
            self._known[site] = self._read(unit)
        known = self._known[site]
        if known is None or routing.watched or not _follows(inputs.attention_mask):
            return None
        x_D, after_D = unit.x_BTD.view(-1), unit.residual_BTD.view(-1)
        with routing.clock.part("router"):
            execute = self._decide(known, site, x_D)
            routing.counters.add(site, self._answers[execute])
        if execute:
            with routing.clock.part(site.kind):
                if known.attention is not None:
                    after_D = known.attention(x_D, after_D, inputs)
                if site.kind == "block":
                    x_D = routing.ops.norm(unit.part.mlp_norm, after_D)
                if known.mlp is not None:
                    after_D = known.mlp(x_D, after_D)
            return after_D.view(1, 1, -1)
        if known.attention is not None and inputs.past_key_values is not None:
            with routing.clock.part("keys"):
                known.attention.keys(x_D, inputs)
        with routing.clock.part("forecast"):
            forecast_D = estimate(known.linear, x_D)
            if forecast_D is not None:
                after_D = after_D + forecast_D.to(after_D.dtype)
        return after_D.view(1, 1, -1)

    def _read(self, unit: Unit) -> _Known | None:
        linear = self.linear.at(unit.site)
        if linear is None or unit.residual_BTD.device.type != "cpu":
            return None
        attends, feeds = unit.attends, unit.site.kind != "attention"
        if attends and not OneQuery.covers(unit.part.attention):
            return None
        if feeds and not OneMlp.covers(unit.part.mlp):
            return None
        return _Known(
            linear,
            float(linear.offset),
            OneQuery(unit.part.attention, self._rotation) if attends else None,
            OneMlp(unit.part.mlp) if feeds else None,
        )

    def _decide(self, known: _Known, site: Site, x_D: Tensor) -> bool:
        state, draw = self.routing.state, self.routing.draw
        assert state.valid_BT is not None
        if state.threshold is None:
            # a padding token bypasses everything
            real = bool(state.valid_BT)
            state.threshold = float(self.routing.method.threshold) if real else float("inf")
        score = float(torch.dot(x_D.float(), known.linear.score_D))
        if draw is not None:
            return bool(draw(site, state.valid_BT))
        return score + known.offset > state.threshold


def _follows(mask: object) -> bool:
    """True for no mask and for one of scores, [1, 1, 1, keys]."""
    return mask is None or (isinstance(mask, Tensor) and mask.dim() == 4)
