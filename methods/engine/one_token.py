"""Decoding one sequence on the host: a number decides, and a bypassed unit costs next to nothing.

With one token a forward is bound by the bytes of its weights and by the number of its operations,
so that this path calls as few as it can.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from methods.base import LinearUnit, Site
from methods.engine.unit import Unit
from methods.engine.wrap import Routing


@dataclass(frozen=True)
class _Site:
    unit: LinearUnit
    offset: float


class OneToken:
    """Runs the units of one token where the method is linear there, else declines."""

    def __init__(self, routing: Routing) -> None:
        self.routing = routing
        self._sites: dict[Site, _Site | None] = {}
        self._answers = {value: torch.tensor([[value]]) for value in (True, False)}

    def forget(self) -> None:
        """The method's weights may have changed."""
        self._sites.clear()

    def __call__(self, unit: Unit) -> Tensor | None:
        """Residual stream after the unit, [1, 1, D]; None if this path does not apply."""
        routing = self.routing
        if routing.watched or unit.residual_BTD.device.type != "cpu":
            return None
        if unit.site not in self._sites:
            self._sites[unit.site] = self._read(unit.site)
        site = self._sites[unit.site]
        if site is None:
            return None
        with routing.clock.part("router"):
            execute = self._decide(site, unit)
            routing.counters.add(unit.site, self._answers[execute])
        if execute:
            with routing.clock.part(unit.site.kind):
                return unit.run()
        if unit.attends:
            with routing.clock.part("keys"):
                unit.write_keys()
        with routing.clock.part("forecast"):
            return _bypass(site.unit, unit)

    def _read(self, site: Site) -> _Site | None:
        linear = self.routing.method.linear(site)
        return None if linear is None else _Site(linear, float(linear.offset))

    def _decide(self, site: _Site, unit: Unit) -> bool:
        state, draw = self.routing.state, self.routing.draw
        assert state.valid_BT is not None
        if state.threshold is None:
            # a padding token bypasses everything
            real = bool(state.valid_BT)
            state.threshold = float(self.routing.method.threshold) if real else float("inf")
        score = float(torch.dot(unit.x_BTD.flatten().float(), site.unit.score_D))
        if draw is not None:
            return bool(draw(unit.site, state.valid_BT))
        return score + site.offset > state.threshold


def _bypass(linear: LinearUnit, unit: Unit) -> Tensor:
    if linear.down_rD is None or linear.up_Dr is None:
        return unit.residual_BTD
    hidden = functional.linear(unit.x_BTD.float(), linear.down_rD, linear.down_bias_r)
    if linear.silu:
        hidden = functional.silu(hidden, inplace=True)
    estimate = functional.linear(hidden, linear.up_Dr, linear.bias_D)
    return unit.residual_BTD + estimate.to(unit.residual_BTD.dtype)
