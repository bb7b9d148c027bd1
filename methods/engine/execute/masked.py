"""Masked execution: compute every token, then blend. The reference for every faster path."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from methods.base import Decision
from methods.engine.cache.evict import FlaggedKeys, keys_in_sight, layer_of, visible
from methods.engine.decoder.unit import Unit
from methods.engine.routing import Routing


class MaskedExecutor:
    """Executed tokens get the unit's output, bypassed ones the method's estimate (or nothing)."""

    def __init__(self, routing: Routing) -> None:
        self.routing = routing

    def __call__(self, unit: Unit) -> Tensor:
        """Residual stream after the unit, [B, T, D]."""
        if unit.site in self.routing.counters.estimated:
            return self.routing.estimated(unit)
        decision = self.routing.decide(unit)
        executed = self._execute(unit, decision)
        if self.routing.unit_observer is not None:
            self.routing.unit_observer(unit, decision, executed)
        return self.blend(unit, decision, executed)

    def blend(self, unit: Unit, decision: Decision, after_BTD: Tensor) -> Tensor:
        """Residual stream after the unit, from what it gives if every token executes it."""
        executed, scale = after_BTD, decision.scale_BT
        estimate = self.routing.approximate(unit.site, unit.x_BTD)
        if scale is not None:
            executed = scaled(unit.residual_BTD, after_BTD, scale)
            estimate = None if estimate is None else estimate * wide(scale).to(estimate.dtype)
        bypassed = unit.residual_BTD if estimate is None else unit.residual_BTD + estimate
        if not self.routing.training or scale is not None:
            return torch.where(decision.execute_BT[..., None], executed, bypassed)
        gate = decision.gate_BT[..., None].to(executed.dtype)
        return gate * executed + (1 - gate) * bypassed

    def _execute(self, unit: Unit, decision: Decision) -> Tensor:
        """Run the unit for every token; under `evict`, queries see executed tokens' keys only."""
        execute, method = decision.execute_BT, self.routing.method
        if method.kv_policy != "evict" or not unit.attends:
            self.routing.counters.add(unit.site, execute)
            return unit.run()
        kept, inputs, tokens = execute, unit.inputs, execute.shape[1]
        if inputs.past_key_values is not None:
            kept = layer_of(inputs.past_key_values, unit.site.layer, FlaggedKeys).note(execute)
        keys_BT = keys_in_sight(kept, tokens, inputs.window)
        self.routing.counters.add(unit.site, execute, keys_BT)
        mask, past = inputs.attention_mask, kept.shape[1] - tokens
        mask = visible(kept, mask, past=past, tokens=tokens, window=inputs.window)
        return unit.run(replace(inputs, attention_mask=mask))


def scaled(residual_BTD: Tensor, after_BTD: Tensor, scale_BT: Tensor) -> Tensor:
    """Residual stream with what the unit added scaled; `after` itself where the scale is 1."""
    return torch.lerp(residual_BTD, after_BTD, wide(scale_BT).to(after_BTD.dtype))


def wide(scale: Tensor) -> Tensor:
    """A decision's scale as [B, T, 1], or [B, T, D] if it has one for each number."""
    return scale if scale.dim() == 3 else scale[..., None]
