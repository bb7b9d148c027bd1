"""Gathered execution: run each unit on the tokens that it executes, and on no others."""

from __future__ import annotations

import torch
from torch import Tensor

from methods.base import Decision
from methods.engine.evict import KeptKeys
from methods.engine.fused import FusedExecutor
from methods.engine.kernels.choose import use_triton
from methods.engine.masked import MaskedExecutor, scaled
from methods.engine.one_token import OneToken
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
        self.one_token = OneToken(routing)
        self.fused = FusedExecutor(routing, routing.kernels)

    def __call__(self, unit: Unit) -> Tensor:
        """Residual stream after the unit, [B, T, D]."""
        routing = self.routing
        if routing.training or torch.is_grad_enabled():
            self.one_token.forget()
        if routing.training:
            return self.masked(unit)
        if use_triton(routing.kernels, unit.x_BTD) and self.fused.covers(unit):
            return self.fused(unit)
        evicts = routing.method.kv_policy == "evict" and unit.attends
        keeps = routing.method.kv_policy == "keep" or not unit.attends
        if unit.residual_BTD.shape[:2] == (1, 1) and keeps:
            done = self.one_token(unit)
            if done is not None:
                return done
        with routing.clock.part("router"):
            decision = routing.decide(unit)
            execute = decision.execute_BT
            keys_BT = _keys_in_sight(unit, execute) if evicts else None
            routing.counters.add(unit.site, execute, keys_BT)
        with routing.clock.part("rows"):
            rows = executed_rows(execute)
        if len(rows.index_N) == execute.numel() and not evicts:
            with routing.clock.part(unit.site.kind):
                return executed(unit, decision)
        if unit.after_BTD is not None:
            return self.masked.blend(unit, decision, unit.after_BTD)
        return self._add(unit, rows, decision)

    def _add(self, unit: Unit, rows: Rows, decision: Decision) -> Tensor:
        method, valid_BT, clock = (
            self.routing.method,
            self.routing.state.valid_BT,
            self.routing.clock,
        )
        assert valid_BT is not None
        with clock.part(unit.site.kind):
            delta_ND = unit.run_rows(rows, method.kv_policy)
        with clock.part("scatter"):
            after = unit.residual_BTD.clone()
            if len(delta_ND):
                put(after, rows.index_N, scaled_rows(delta_ND, rows.index_N, decision))
            bypassed = bypassed_index(decision.execute_BT, valid_BT)
        if len(bypassed):
            with clock.part("forecast"):
                x_1MD = take(unit.x_BTD, bypassed)[None]
                estimate = method.approximate(unit.site, x_1MD)
                if estimate is not None:
                    put(after, bypassed, scaled_rows(estimate[0], bypassed, decision))
        return after


def executed(unit: Unit, decision: Decision) -> Tensor:
    """Residual stream after a unit that every token executes."""
    after, scale_BT = unit.run(), decision.scale_BT
    return after if scale_BT is None else scaled(unit.residual_BTD, after, scale_BT)


def scaled_rows(delta_ND: Tensor, index_N: Tensor, decision: Decision) -> Tensor:
    """What these tokens get, times the decision's scale if it has one."""
    if decision.scale_BT is None:
        return delta_ND
    return delta_ND * take(decision.scale_BT[..., None], index_N)


def _keys_in_sight(unit: Unit, execute_BT: Tensor) -> Tensor:
    """Under `evict`: executed tokens up to and including each one, those in the cache first."""
    cache, rank = unit.inputs.past_key_values, rank_BT(execute_BT)
    index = unit.site.layer
    layer = None if cache is None or len(cache.layers) <= index else cache.layers[index]
    if not isinstance(layer, KeptKeys) or not layer.counts:
        return rank
    return rank + torch.tensor(layer.counts, device=rank.device)[:, None]
