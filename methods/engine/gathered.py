"""Gathered execution: run each unit on the tokens that it executes, and on no others."""

from __future__ import annotations

from torch import Tensor

from methods.engine.masked import MaskedExecutor
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
            return unit.run()
        after = unit.residual_BTD.clone()
        put(after, rows.index_N, unit.run_rows(rows))
        bypassed = bypassed_index(decision.execute_BT, valid)
        if len(bypassed):
            estimate = self.routing.method.approximate(unit.site, take(unit.x_BTD, bypassed)[None])
            if estimate is not None:
                put(after, bypassed, estimate[0])
        return after
