"""Masked execution: compute every token, then blend. The reference for every faster path."""

from __future__ import annotations

import torch
from torch import Tensor

from methods.base import Decision
from methods.engine.wrap import Routing, Unit


class MaskedExecutor:
    """Executed tokens get the unit's output, bypassed ones the method's estimate (or nothing)."""

    def __init__(self, routing: Routing) -> None:
        self.routing = routing

    def __call__(self, unit: Unit) -> Tensor:
        """Residual stream after the unit, [B, T, D]."""
        decision = self.routing.decide(unit)
        return self.blend(unit, decision)

    def blend(self, unit: Unit, decision: Decision) -> Tensor:
        """Residual stream after the unit, from its output for every token."""
        executed = executed_part(unit, decision)
        estimate = self.routing.method.approximate(unit.site, unit.x_BTD)
        if decision.scale_BT is not None and estimate is not None:
            estimate = estimate * decision.scale_BT[..., None].to(estimate.dtype)
        bypassed = unit.residual_BTD if estimate is None else unit.residual_BTD + estimate
        if not self.routing.training or decision.scale_BT is not None:
            return torch.where(decision.execute_BT[..., None], executed, bypassed)
        gate = decision.gate_BT[..., None].to(executed.dtype)
        return gate * executed + (1 - gate) * bypassed


def executed_part(unit: Unit, decision: Decision) -> Tensor:
    """Residual stream after the unit where it is executed, its output scaled if asked for.

    A scale of 1 gives the unscaled value exactly.
    """
    executed = unit.run()
    if decision.scale_BT is None:
        return executed
    scale = decision.scale_BT[..., None].to(executed.dtype)
    return torch.lerp(unit.residual_BTD, executed, scale)
