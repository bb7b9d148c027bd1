"""Masked execution: compute every token, then blend. The reference for every faster path."""

from __future__ import annotations

import torch
from torch import Tensor

from methods.engine.wrap import Routing, Unit


class MaskedExecutor:
    """Executed tokens get the unit's output, bypassed ones the method's estimate (or nothing)."""

    def __init__(self, routing: Routing) -> None:
        self.routing = routing

    def __call__(self, unit: Unit) -> Tensor:
        """Residual stream after the unit, [B, T, D]."""
        decision = self.routing.decide(unit)
        executed = unit.run()
        estimate = self.routing.method.approximate(unit.site, unit.x_BTD)
        bypassed = unit.residual_BTD if estimate is None else unit.residual_BTD + estimate
        if not self.routing.training:
            return torch.where(decision.execute_BT[..., None], executed, bypassed)
        gate = decision.gate_BT[..., None].to(executed.dtype)
        return gate * executed + (1 - gate) * bypassed
