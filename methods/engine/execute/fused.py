"""Gathered execution through fused kernels: nothing waits for the device, everything is in place.

Each step is one function of `methods.engine.ops.triton`, a Triton kernel on CUDA and its PyTorch
reference elsewhere. Counts stay on the device: grids are as large as they may need to be, and
tiles beyond the count end at once, so a forward can be captured in a CUDA graph.

Shapes: B sequences, T tokens, N = B * T rows, D width, H heads, K key-value heads, d head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from methods.base import SwiGLU
from methods.engine.decoder.unit import Unit
from methods.engine.execute.attention import is_llama_like, keys_of_all, split_heads
from methods.engine.execute.masked import scaled
from methods.engine.ops.choose import Kernels
from methods.engine.ops.linear import all_linear, weight_of
from methods.engine.ops.rotary import angles_of
from methods.engine.ops.swiglu import is_swiglu
from methods.engine.ops.triton.attend_rows import attend
from methods.engine.ops.triton.linear_rows import linear_rows, linear_rows_add, swiglu_rows
from methods.engine.ops.triton.route import forecast_bypassed, route_and_forecast
from methods.engine.ops.triton.types import Partition, Sight
from methods.engine.routing import Routing

PROJECTIONS = {"attention": ("q_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}


class FusedExecutor:
    """Runs units under KV policy `keep` whose projections are plain linear layers.

    Args:
        kernels: passed on to every kernel.
    """

    def __init__(self, routing: Routing, kernels: Kernels) -> None:
        self.routing, self.kernels = routing, kernels

    def covers(self, unit: Unit) -> bool:
        """False where the general gathered path has to run: `evict`, adapters, other masks,
        packed rows."""
        if unit.attends and self.routing.method.kv_policy != "keep":
            return False
        if self.routing.training or torch.is_grad_enabled():
            return False
        call = unit.inputs.call
        if not (call.only_padding and call.padding()[1] and unit.part.adds_as_is):
            return False
        parts: list[Any] = []
        if unit.attends:
            if not is_llama_like(unit.part.attention, unit.inputs):
                return False
            parts += [getattr(unit.part.attention, name, None) for name in PROJECTIONS["attention"]]
        if unit.site.kind != "attention":
            mlp: Any = unit.part.mlp
            if not is_swiglu(mlp):
                return False
            parts += [getattr(mlp, name, None) for name in PROJECTIONS["mlp"]]
        return all_linear(parts)

    def __call__(self, unit: Unit) -> Tensor:
        """Residual stream after the unit, [B, T, D]."""
        routing, after = self.routing, unit.residual_BTD.clone()
        residual_ND = after.view(-1, after.shape[-1])
        with routing.part("router"):
            rows, scale_BT = self._route(unit, residual_ND)
        with routing.part(unit.site.kind):
            if unit.attends:
                self._attention(unit, residual_ND, rows)
            if unit.site.kind == "block":
                self._mlp(unit, unit.part.mlp_norm(after), residual_ND, rows)
            if unit.site.kind == "mlp":
                self._mlp(unit, unit.x_BTD, residual_ND, rows)
        return after if scale_BT is None else scaled(unit.residual_BTD, after, scale_BT)

    def _route(self, unit: Unit, residual_ND: Tensor) -> tuple[Partition, Tensor | None]:
        """Decide, add the estimate of bypassed tokens, and sort the rows: (rows, scale)."""
        routing, valid_BT = self.routing, unit.inputs.call.valid_BT
        x_ND, valid_N, shape = _flat(unit.x_BTD), valid_BT.reshape(-1), valid_BT.shape
        options: dict[str, Any] = {"tokens": shape[1], "kernels": self.kernels}
        linear = routing.method.linear(unit.site)
        if linear is not None and not (routing.watched or routing.drawn):
            reserved_BT = unit.inputs.call.reserved_BT
            done = route_and_forecast(
                x_ND,
                residual_ND,
                valid_N,
                linear,
                routing.method.threshold,
                reserved_N=None if reserved_BT is None else reserved_BT.reshape(-1),
                **options,
            )
            routing.counters.add(unit.site, done.execute_N.view(shape))
            return done.rows, None
        decision = routing.decide(unit)
        execute_BT = decision.execute_BT
        routing.counters.add(unit.site, execute_BT)
        execute_N = execute_BT.reshape(-1)
        if linear is None:
            estimate = routing.approximate(unit.site, unit.x_BTD)
            if estimate is not None:
                away = execute_N | ~valid_N
                residual_ND += _flat(estimate).masked_fill(away[:, None], 0)
        rows = forecast_bypassed(x_ND, residual_ND, valid_N, execute_N, linear, **options)
        return rows, decision.scale_BT

    def _attention(self, unit: Unit, residual_ND: Tensor, rows: Partition) -> None:
        attention: Any = unit.part.attention
        inputs = unit.inputs
        angles = angles_of(inputs.position_embeddings)
        key, value = keys_of_all(attention, unit.x_BTD, inputs, angles, self.routing.ops)
        tokens = unit.x_BTD.shape[1]
        q_proj, o_proj = _weights(attention.q_proj), _weights(attention.o_proj)
        query = linear_rows(_flat(unit.x_BTD), rows, *q_proj, kernels=self.kernels)
        past = inputs.call.past
        pads_B, _ = inputs.call.padding()
        if not isinstance(past, Tensor):
            # a sliding window has dropped keys before the first
            gone = max(0, past + tokens - key.shape[2])
            past, pads_B = past - gone, None if pads_B is None else (pads_B - gone).clamp_min(0)
        sight = Sight(tokens, past, window=inputs.window, first_valid_B=pads_B)
        out_NHd = attend(
            self.routing.ops.rotate(split_heads(attention, "q", query), angles.at(rows.index_N)),
            rows,
            key,
            value,
            sight,
            scale=attention.scaling,
            kernels=self.kernels,
        )
        linear_rows_add(out_NHd.flatten(1), residual_ND, rows, *o_proj, kernels=self.kernels)

    def _mlp(self, unit: Unit, x_BTD: Tensor, residual_ND: Tensor, rows: Partition) -> None:
        parts = [getattr(unit.part.mlp, name) for name in PROJECTIONS["mlp"]]
        weights, biases = zip(*map(_weights, parts), strict=True)
        swiglu_rows(_flat(x_BTD), residual_ND, rows, SwiGLU(*weights), biases, kernels=self.kernels)


def _flat(x_BTD: Tensor) -> Tensor:
    return x_BTD.reshape(-1, x_BTD.shape[-1])


def _weights(linear: Any) -> tuple[Tensor, Tensor | None]:
    return weight_of(linear), linear.bias
