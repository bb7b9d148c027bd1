"""Gathered execution: run each unit on the tokens that it executes, and on no others."""

from __future__ import annotations

from torch import Tensor

from methods.base import Decision
from methods.engine.evict import KeptKeys
from methods.engine.masked import MaskedExecutor, scaled
from methods.engine.rows import Rows, bypassed_index, executed_rows, put, rank_BT, take
from methods.engine.unit import Unit
from methods.engine.wrap import Routing


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
        evicts = self.routing.method.kv_policy == "evict" and unit.attends
        execute = decision.execute_BT
        keys_BT = _keys_in_sight(unit, execute) if evicts else None
        self.routing.counters.add(unit.site, execute, keys_BT)
        rows = executed_rows(execute)
        if len(rows.index_N) == execute.numel() and not evicts:
            scale, after = decision.scale_BT, unit.run()
            return after if scale is None else scaled(unit.residual_BTD, after, scale)
        if unit.after_BTD is not None:
            return self.masked.blend(unit, decision, unit.after_BTD)
        return self._add(unit, rows, decision)

    def _add(self, unit: Unit, rows: Rows, decision: Decision) -> Tensor:
        method, valid_BT = self.routing.method, self.routing.state.valid_BT
        assert valid_BT is not None
        scale_BT1 = None if decision.scale_BT is None else decision.scale_BT[..., None]
        after = unit.residual_BTD.clone()

        def add(index_N: Tensor, delta_ND: Tensor) -> None:
            part = delta_ND if scale_BT1 is None else delta_ND * take(scale_BT1, index_N)
            put(after, index_N, part)

        delta_ND = unit.run_rows(rows, method.kv_policy)
        if len(delta_ND):
            add(rows.index_N, delta_ND)
        bypassed = bypassed_index(decision.execute_BT, valid_BT)
        if len(bypassed):
            estimate = method.approximate(unit.site, take(unit.x_BTD, bypassed)[None])
            if estimate is not None:
                add(bypassed, estimate[0])
        return after


def _keys_in_sight(unit: Unit, execute_BT: Tensor) -> Tensor:
    """Under `evict`: executed tokens up to and including each one, those in the cache first."""
    cache, rank = unit.inputs.past_key_values, rank_BT(execute_BT)
    index = unit.site.layer
    layer = None if cache is None or len(cache.layers) <= index else cache.layers[index]
    if not isinstance(layer, KeptKeys) or not layer.counts:
        return rank
    return rank + rank.new_tensor(layer.counts)[:, None]
