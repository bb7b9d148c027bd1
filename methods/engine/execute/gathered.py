"""Gathered execution: run each unit on the tokens that it executes, and on no others."""

from __future__ import annotations

import torch
from torch import Tensor

from methods.base import Decision, KVPolicy, LinearUnit
from methods.engine.cache.evict import KeptKeys
from methods.engine.cache.growing import held_layer
from methods.engine.decoder.unit import Unit
from methods.engine.execute.attention import attend_rows
from methods.engine.execute.fused import FusedExecutor
from methods.engine.execute.linear_sites import LinearSites
from methods.engine.execute.masked import MaskedExecutor, scaled, wide
from methods.engine.execute.one_token import OneToken
from methods.engine.ops.choose import use_triton
from methods.engine.ops.rows import Rows, take
from methods.engine.ops.swiglu import swiglu, weights_for_few
from methods.engine.routing import Routing


class GatheredExecutor:
    """Gather, execute, scatter; bypassed tokens get the method's estimate.

    Equal to the masked path to float tolerance.
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
        """Take the first path that covers the unit; each is cheaper than those after it.

        A path that may decline comes before the router is asked: it decides in a way of its own,
        and a method must be asked once a unit.
        """
        routing, policy = self.routing, self.routing.method.kv_policy
        if routing.training or torch.is_grad_enabled():
            # weights that were read once a block may have changed since
            self.linear.forget()
            self.one_token.forget()
        # 1. masked, in training: gates carry gradient to the output of every token, bypassed or not
        if routing.training:
            return self.masked(unit)
        # 2. static: nobody decides, and no token is unlike another
        if unit.site in routing.counters.estimated:
            with routing.part("forecast"):
                after = self.linear.estimated(unit)
                return routing.estimated(unit) if after is None else after
        # 3. fused: on a GPU nothing may wait for the device, so not even the counts are read;
        # before the others, which bring the decision to the host
        if use_triton(routing.kernels, unit.residual_BTD) and self.fused.covers(unit):
            return self.fused(unit)
        evicts = policy == "evict" and unit.attends
        # 4. one token: a number decides, and there is nothing to gather; `evict` and `forecast`
        # treat keys in a way that this path does not know
        alone = unit.residual_BTD.numel() == unit.residual_BTD.shape[-1]
        if alone and (policy == "keep" or not unit.attends):
            done = self.one_token(unit)
            if done is not None:
                return done
        with routing.part("router"):
            linear = self.linear.at(unit.site)
            decision = routing.decide(unit) if linear is None else self.linear.decide(unit)
            execute = decision.execute_BT
            keys_BT = _keys_in_sight(unit, execute) if evicts else None
            routing.counters.add(unit.site, execute, keys_BT)
        with routing.part("rows"):
            rows, bypassed = routing.ops.split(execute, unit.inputs.call.valid_BT)
        # 5. all executed: the library's own attention, on the batch as it is; not under `evict`,
        # whose cache is the engine's
        if rows.number == execute.numel() and not evicts:
            with routing.part(unit.site.kind):
                return executed(unit, decision)
        # 6. blend: an oracle has already computed the unit for every token
        if unit.after_BTD is not None:
            return self.masked.blend(unit, decision, unit.after_BTD)
        # 7. gather, execute, scatter
        return self._add(unit, rows, bypassed, decision, linear)

    def _add(
        self,
        unit: Unit,
        rows: Rows,
        bypassed: Tensor,
        decision: Decision,
        linear: LinearUnit | None,
    ) -> Tensor:
        routing, ops = self.routing, self.routing.ops
        others = bypassed.shape[0]
        # a method that was asked may hold the stream; one that was not cannot
        residual = after = unit.residual_BTD
        with routing.part("scatter"):
            if not unit.owned or linear is None:
                written = rows.number + others == rows.tokens * len(rows.counts)
                forecasts = linear is not None and linear.down_rD is not None
                after = ops.output_buffer(residual, filled=written and forecasts)
        with routing.part(unit.site.kind):
            x_BTD = unit.x_BTD  # of the stream before it is written to
            added = decision.scale_BT is None and add_mlp(unit, rows, after)
            delta_ND = None if added else run_rows(unit, rows, routing.method.kv_policy)
        with routing.part("scatter"):
            if delta_ND is not None and rows.number:
                ops.add(
                    residual, after, rows.index_N, scaled_rows(delta_ND, rows.index_N, decision)
                )
        if not others:
            return after
        with routing.part("forecast"):
            if linear is not None:
                ops.forecast(self.linear.for_rows(unit.site), x_BTD, residual, after, bypassed)
                return after
            forecast = routing.approximate(unit.site, take(x_BTD, bypassed)[None])
            if forecast is not None:
                ops.add(residual, after, bypassed, scaled_rows(forecast[0], bypassed, decision))
        return after


def executed(unit: Unit, decision: Decision) -> Tensor:
    """Residual stream after a unit that every token executes."""
    after, scale_BT = unit.after_BTD, decision.scale_BT
    if after is None:
        after = unit.run_with(lambda x: _mlp(unit, x), unit.inputs)
    return after if scale_BT is None else scaled(unit.residual_BTD, after, scale_BT)


def run_rows(unit: Unit, rows: Rows, kv_policy: KVPolicy) -> Tensor:
    """Execute for these tokens only: what it adds to their residual stream, [N, D].

    K and V enter the cache for every token under `keep`, for these tokens under `evict`.
    """
    part, ops = unit.part, unit.ops
    if not unit.attends:
        given = swiglu(part.mlp, unit.x_BTD.flatten(0, 1), ops, rows.index_N)
        return unit.added("mlp", given)
    attended = attend_rows(part.attention, unit.x_BTD, rows, unit.inputs, kv_policy, ops)
    attended = unit.added("attention", attended)
    if unit.site.kind == "attention":
        return attended
    middle = take(unit.residual_BTD, rows.index_N) + attended
    return attended + unit.added("mlp", _mlp(unit, ops.norm(part.mlp_norm, middle)))


def add_mlp(unit: Unit, rows: Rows, into_BTD: Tensor) -> bool:
    """into[rows] = residual[rows] + the MLP's output; False leaves it to `run_rows`."""
    if unit.attends or not unit.part.adds_as_is:
        return False
    weights = weights_for_few(unit.part.mlp, unit.x_BTD, rows.number, unit.ops)
    if weights is not None:
        unit.ops.add_mlp(weights, unit.x_BTD, unit.residual_BTD, into_BTD, rows.index_N)
    return weights is not None


def _mlp(unit: Unit, x: Tensor) -> Tensor:
    return swiglu(unit.part.mlp, x.flatten(0, -2), unit.ops).view_as(x)


def scaled_rows(delta_ND: Tensor, index_N: Tensor, decision: Decision) -> Tensor:
    """What these tokens get, times the decision's scale if it has one."""
    if decision.scale_BT is None:
        return delta_ND
    return delta_ND * take(wide(decision.scale_BT), index_N)


def _keys_in_sight(unit: Unit, execute_BT: Tensor) -> Tensor:
    """Under `evict`: executed tokens up to and including each one, those in the cache first."""
    layer = held_layer(unit.inputs.past_key_values, unit.site.layer)
    layer = layer if isinstance(layer, KeptKeys) else KeptKeys()
    return layer.in_sight(execute_BT, unit.inputs.window)
