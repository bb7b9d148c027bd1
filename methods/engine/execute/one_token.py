"""Decoding one sequence on the host: a number decides, and a bypassed unit costs next to nothing.

With one token a forward is bound by the bytes of its weights and by the number of its operations,
so that this path calls as few as it can: attention and MLP are products with vectors.

Shapes: D model width, H heads, K key-value heads, d head size, S keys, F MLP width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from methods.base import LinearUnit, Site
from methods.engine.decoder.inputs import LayerInputs
from methods.engine.decoder.unit import Unit
from methods.engine.execute.attention import is_llama_like
from methods.engine.execute.linear_sites import LinearSites
from methods.engine.ops.linear import all_linear, estimate, weight_of
from methods.engine.ops.rotary import rotate
from methods.engine.ops.swiglu import NAMES, is_swiglu
from methods.engine.routing import Routing


@dataclass(slots=True)
class _Known:
    """A unit read once: how it decides, estimates and executes."""

    linear: LinearUnit
    offset: float
    attention: OneQuery | None
    mlp: tuple[nn.Linear, ...] | None
    """Its gate, up and down projection."""
    hooks: list[Any]
    """Of its projections, which this path does not call."""


class OneToken:
    """Runs the units of one token where the method is linear and the model plain, else declines."""

    def __init__(self, routing: Routing, linear: LinearSites) -> None:
        self.routing, self.linear = routing, linear
        self._known: dict[Site, _Known | None] = {}
        self._answers = {value: torch.tensor([[value]]) for value in (True, False)}
        self._rotation = Rotation()

    def forget(self) -> None:
        """The weights may have changed."""
        self._known.clear()

    def __call__(self, unit: Unit) -> Tensor | None:
        """Residual stream after the unit, [1, 1, D]; None if this path does not apply."""
        routing, site, inputs = self.routing, unit.site, unit.inputs
        if site not in self._known:
            self._known[site] = self._read(unit)
        known = self._known[site]
        if known is None or routing.watched or any(known.hooks):
            return None
        x_D, after_D = unit.x_BTD.view(-1), unit.residual_BTD.view(-1)
        with routing.part("router"):
            execute = self._decide(known, unit, x_D)
            routing.counters.add(site, self._answers[execute])
        if execute:
            with routing.part(site.kind):
                if known.attention is not None:
                    after_D = known.attention(x_D, after_D, inputs)
                if site.kind == "block":
                    x_D = routing.ops.norm(unit.part.mlp_norm, after_D)
                if known.mlp is not None:
                    after_D = one_mlp(known.mlp, x_D, after_D)
            return after_D.view(1, 1, -1)
        if known.attention is not None and inputs.past_key_values is not None:
            with routing.part("keys"):
                known.attention.keys(x_D, inputs)
        with routing.part("forecast"):
            forecast_D = estimate(known.linear, x_D)
            if forecast_D is not None:
                after_D = after_D + forecast_D.to(after_D.dtype)
        return after_D.view(1, 1, -1)

    def _read(self, unit: Unit) -> _Known | None:
        linear, mlp = self.linear.at(unit.site), unit.part.mlp
        if linear is None or unit.residual_BTD.device.type != "cpu":
            return None
        attends, feeds = unit.attends, unit.site.kind != "attention"
        attention: Any = unit.part.attention
        projections = [getattr(attention, f"{name}_proj", None) for name in "qkvo"]
        if not unit.part.adds_as_is:
            return None
        if attends and not (all_linear(projections) and is_llama_like(attention, unit.inputs)):
            return None
        if feeds and not (is_swiglu(mlp) and all_linear(getattr(mlp, name) for name in NAMES)):
            return None
        one_query = OneQuery(attention, self._rotation) if attends else None
        parts = tuple(getattr(mlp, name) for name in NAMES) if feeds else None
        called = [*(projections if attends else ()), *(parts or ())]
        hooks = [h for part in called for h in (part._forward_hooks, part._forward_pre_hooks)]
        return _Known(linear, float(linear.offset), one_query, parts, hooks)

    def _decide(self, known: _Known, unit: Unit, x_D: Tensor) -> bool:
        call, bench = unit.inputs.call, self.routing.bench
        if call.threshold is None:
            call.threshold = float(self.routing.method.threshold)
            if not bool(call.valid_BT):  # a padding token bypasses everything
                call.threshold = math.inf
            elif call.reserved_BT is not None and bool(call.reserved_BT):
                call.threshold = -math.inf
        score = float(torch.dot(x_D.float(), known.linear.score_D))
        if bench is not None and bench.draw is not None:
            return bool(bench.draw(unit.site, call.valid_BT))
        return score + known.offset > call.threshold


class Rotation:
    """Rotary embedding at one position, which is one matrix; made once for all layers."""

    def __init__(self) -> None:
        self._angles: tuple[Tensor, Tensor] | None = None
        self._matrix_dd = torch.empty(0)

    def __call__(self, heads_Hd: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """[H, d] -> [H, d].

        Args:
            angles: cos and sin, [1, 1, d] each; the same objects for all layers of a forward.
        """
        if self._angles is not angles:
            cos, sin = (angle.view(1, -1) for angle in angles)
            eye = torch.eye(cos.shape[1], dtype=cos.dtype, device=cos.device)
            self._angles, self._matrix_dd = angles, rotate(eye, cos, sin)
        return heads_Hd @ self._matrix_dd


class OneQuery:
    """An attention module with `q_proj`, `k_proj`, `v_proj`, `o_proj` as plain linear layers."""

    def __init__(self, attention: Any, rotation: Rotation) -> None:
        self.q, self.k = attention.q_proj, attention.k_proj
        self.v, self.o = attention.v_proj, attention.o_proj
        self.q_norm = getattr(attention, "q_norm", None)
        self.k_norm = getattr(attention, "k_norm", None)
        self.size, self.scaling = attention.head_dim, attention.scaling
        self.layer, self.rotation = attention.layer_idx, rotation

    def keys(self, x_D: Tensor, inputs: LayerInputs) -> tuple[Tensor, Tensor]:
        """Keys and values after those of the cache, which the token's enter: [1, K, S, d]."""
        key = self._heads(self.k, self.k_norm, x_D, inputs)[None, :, None]
        value = product(self.v, x_D).view(1, -1, 1, self.size)
        if inputs.past_key_values is None:
            return key, value
        pair: tuple[Tensor, Tensor] = inputs.past_key_values.update(key, value, self.layer)
        return pair

    def __call__(self, x_D: Tensor, residual_D: Tensor, inputs: LayerInputs) -> Tensor:
        """Residual stream after attention, [D]; the heads that share a key are rows."""
        key, value = self.keys(x_D, inputs)
        out = functional.scaled_dot_product_attention(
            self._heads(self.q, self.q_norm, x_D, inputs).view(1, key.shape[1], -1, self.size),
            key,
            value,
            attn_mask=inputs.attention_mask,
            scale=self.scaling,
        )
        return plus_product(residual_D, self.o, out.reshape(-1))

    def _heads(self, linear: nn.Linear, norm: Any, x_D: Tensor, inputs: LayerInputs) -> Tensor:
        heads_Hd = product(linear, x_D).view(-1, self.size)
        if norm is not None:
            heads_Hd = norm(heads_Hd)
        return self.rotation(heads_Hd, inputs.position_embeddings)


def one_mlp(mlp: tuple[nn.Linear, ...], x_D: Tensor, residual_D: Tensor) -> Tensor:
    """Residual stream after down(silu(gate(x)) * up(x)) of plain linear layers, [D]."""
    gate, up, down = mlp
    hidden_F = functional.silu(product(gate, x_D), inplace=True)
    return plus_product(residual_D, down, hidden_F.mul_(product(up, x_D)))


def product(linear: nn.Linear, x_D: Tensor) -> Tensor:
    """The layer's output for one vector."""
    if linear.bias is None:
        return torch.mv(weight_of(linear), x_D)
    return torch.addmv(linear.bias, weight_of(linear), x_D)


def plus_product(residual_D: Tensor, linear: nn.Linear, x: Tensor) -> Tensor:
    """The same added to a vector."""
    out = torch.addmv(residual_D, weight_of(linear), x)
    return out if linear.bias is None else out.add_(linear.bias)
