"""Gathered execution: run each unit on the tokens that it executes, and on no others."""

from __future__ import annotations

import torch
from torch import Tensor

from methods.base import Decision, LinearUnit
from methods.engine.cache.evict import KeptKeys
from methods.engine.cache.growing import held_layer
from methods.engine.decoder.unit import Unit
from methods.engine.execute.fused import FusedExecutor
from methods.engine.execute.linear_sites import LinearSites
from methods.engine.execute.masked import MaskedExecutor, scaled
from methods.engine.execute.one_token import OneToken
from methods.engine.ops.choose import use_triton
from methods.engine.ops.rows import Rows, rank_BT, take
from methods.engine.routed import Routing


class GatheredExecutor:
    """Gather, execute, scatter; bypassed tokens get the method's estimate.

    Equal to the masked path to float tolerance. Training needs the output of every token for
    its gates and takes the masked path.
    """

    def __init__(self, routing: Routing) -> None:
        self.routing, self.masked = routing, MaskedExecutor(routing)
        self.linear = LinearSites(routing)
        self.one_token = OneToken(routing, self.linear)
        self.fused = FusedExecutor(routing, routing.kernels)
        self._eagerly = torch.compiler.disable(self._run)

    def __call__(self, unit: Unit) -> Tensor:
        """Residual stream after the unit, [B, T, D]."""
        # its shapes follow the data: one graph break a unit, not one at each operation
        return self._eagerly(unit) if torch.compiler.is_compiling() else self._run(unit)

    def _run(self, unit: Unit) -> Tensor:
        routing = self.routing
        if routing.training or torch.is_grad_enabled():
            self.linear.forget()
            self.one_token.forget()
        if routing.training:
            return self.masked(unit)
        if use_triton(routing.kernels, unit.residual_BTD) and self.fused.covers(unit):
            return self.fused(unit)
        evicts = routing.method.kv_policy == "evict" and unit.attends
        keeps = routing.method.kv_policy == "keep" or not unit.attends
        if keeps and unit.residual_BTD.numel() == unit.residual_BTD.shape[-1]:
            done = self.one_token(unit)
            if done is not None:
                return done
        with routing.clock.part("router"):
            linear = self.linear.at(unit.site)
            ask = routing.decide if linear is None else self.linear.decide
            decision = ask(unit)
            execute = decision.execute_BT
            keys_BT = _keys_in_sight(unit, execute) if evicts else None
            routing.counters.add(unit.site, execute, keys_BT)
        with routing.clock.part("rows"):
            rows, bypassed = routing.ops.split(execute, _valid(routing))
        if rows.number == execute.numel() and not evicts:
            with routing.clock.part(unit.site.kind):
                return executed(unit, decision)
        if unit.after_BTD is not None:
            return self.masked.blend(unit, decision, unit.after_BTD)
        return self._add(unit, rows, bypassed, decision, linear)

    def _add(
        self,
        unit: Unit,
        rows: Rows,
        bypassed: Tensor,
        decision: Decision,
        linear: LinearUnit | None,
    ) -> Tensor:
        method, ops, clock = self.routing.method, self.routing.ops, self.routing.clock
        others = bypassed.shape[0]
        # a method that was asked may hold the stream; one that was not cannot
        residual = after = unit.residual_BTD
        with clock.part("scatter"):
            if not unit.owned or linear is None:
                written = rows.number + others == rows.tokens * len(rows.counts)
                forecasts = linear is not None and linear.down_rD is not None
                after = ops.output_buffer(residual, filled=written and forecasts)
        with clock.part(unit.site.kind):
            x_BTD = unit.x_BTD  # of the stream before it is written to
            added = decision.scale_BT is None and unit.add_mlp(rows, after)
            delta_ND = None if added else unit.run_rows(rows, method.kv_policy)
        with clock.part("scatter"):
            if delta_ND is not None and rows.number:
                delta_ND = scaled_rows(delta_ND, rows.index_N, decision)
                ops.add(residual, after, rows.index_N, delta_ND)
        if not others:
            return after
        with clock.part("forecast"):
            if linear is not None:
                maps = self.linear.for_rows(unit.site)
                ops.forecast(maps, x_BTD, residual, after, bypassed)
                return after
            x_MD = take(x_BTD, bypassed)
            forecast = self.routing.approximate(unit.site, x_MD[None])
            if forecast is not None:
                forecast_MD = forecast.view(others, -1)
                delta_ND = scaled_rows(forecast_MD, bypassed, decision)
                ops.add(residual, after, bypassed, delta_ND)
        return after


def executed(unit: Unit, decision: Decision) -> Tensor:
    """Residual stream after a unit that every token executes."""
    after, scale_BT = unit.run_fast(), decision.scale_BT
    return after if scale_BT is None else scaled(unit.residual_BTD, after, scale_BT)


def scaled_rows(delta_ND: Tensor, index_N: Tensor, decision: Decision) -> Tensor:
    """What these tokens get, times the decision's scale if it has one."""
    if decision.scale_BT is None:
        return delta_ND
    return delta_ND * take(decision.scale_BT[..., None], index_N)


def _valid(routing: Routing) -> Tensor:
    assert routing.state.valid_BT is not None
    return routing.state.valid_BT


def _keys_in_sight(unit: Unit, execute_BT: Tensor) -> Tensor:
    """Under `evict`: executed tokens up to and including each one, those in the cache first."""
    cache, rank = unit.inputs.past_key_values, rank_BT(execute_BT)
    layer = held_layer(cache, unit.site.layer)
    if not isinstance(layer, KeptKeys) or not layer.counts:
        return rank
    return rank + torch.tensor(layer.counts, device=rank.device)[:, None]
