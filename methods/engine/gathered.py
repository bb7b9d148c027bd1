"""Gathered execution: run each unit on the tokens that it executes, and on no others."""

from __future__ import annotations

from torch import Tensor

from methods.engine.masked import MaskedExecutor, executed_part
from methods.engine.rows import bypassed_index, executed_rows, put, take
from methods.engine.wrap import Routing, Unit


class GatheredExecutor:
    """Gather, execute, scatter; bypassed tokens get the method's estimate.

    Equal to the masked path to float tolerance. Training needs the output of every token for
    its gates and takes the masked path.
    """

    def __init__(self, routing: Routing) -> None:
        self.routing, self.masked = routing, MaskedExecutor(routing)

    def __call__(self, unit: Unit) -> Tensor:
        """Residual stream after the unit, [B, T, D]."""
        if self.routing.training:
            return self.masked(unit)
        decision = self.routing.decide(unit)
        valid = self.routing.state.valid_BT
        assert valid is not None
        rows = executed_rows(decision.execute_BT)
        if len(rows.index_N) == decision.execute_BT.numel():
            return executed_part(unit, decision)
        if unit.after_BTD is not None:
            return self.masked.blend(unit, decision)
        scale = None if decision.scale_BT is None else decision.scale_BT[..., None]
        after = unit.residual_BTD.clone()
        output = unit.run_rows(rows)
        put(after, rows.index_N, output if scale is None else output * take(scale, rows.index_N))
        bypassed = bypassed_index(decision.execute_BT, valid)
        if len(bypassed):
            estimate = self.routing.method.approximate(unit.site, take(unit.x_BTD, bypassed)[None])
            if estimate is not None:
                part = estimate[0] if scale is None else estimate[0] * take(scale, bypassed)
                put(after, bypassed, part)
        return after
