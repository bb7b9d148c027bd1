"""Decoding one sequence on the host: a number decides, and a bypassed unit costs next to nothing.

With one token a forward is bound by the bytes of its weights and by the number of its operations,
so that this path calls as few as it can: attention and MLP are products with vectors. None of them
is worth a second thread: at the end of a parallel region all its threads are waited for, and one
whose core another program has taken comes back milliseconds later.

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
from methods.engine.execute.attention import enter_keys, is_llama_like
from methods.engine.execute.linear_sites import LinearSites
from methods.engine.ops.linear import all_linear, estimate, weight_of
from methods.engine.ops.rotary import Angles, angles_of
from methods.engine.ops.row_ops import RowOps
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
        self._turned: tuple[Any, Angles] | None = None

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
                    after_D = known.attention(x_D, after_D, inputs, self._angles(inputs))
                if site.kind == "block":
                    x_D = routing.ops.norm(unit.part.mlp_norm, after_D)
                if known.mlp is not None:
                    after_D = one_mlp(known.mlp, x_D, after_D)
            return after_D.view(1, 1, -1)
        if known.attention is not None and inputs.past_key_values is not None:
            with routing.part("keys"):
                known.attention.keys(x_D, inputs, self._angles(inputs))
        with routing.part("forecast"):
            forecast_D = estimate(known.linear, x_D)
            if forecast_D is not None:
                after_D = after_D + forecast_D.to(after_D.dtype)
        return after_D.view(1, 1, -1)

    def _angles(self, inputs: LayerInputs) -> Angles:
        """Made once for all layers of a forward, which are given the same objects."""
        if self._turned is None or self._turned[0] is not inputs.position_embeddings:
            self._turned = inputs.position_embeddings, angles_of(inputs.position_embeddings)
        return self._turned[1]

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
        one_query = OneQuery(attention, self.routing.ops) if attends else None
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


class OneQuery:
    """An attention module with `q_proj`, `k_proj`, `v_proj`, `o_proj` as plain linear layers."""

    def __init__(self, attention: Any, ops: RowOps) -> None:
        self.attention, self.ops = attention, ops
        self.q, self.k = attention.q_proj, attention.k_proj
        self.v, self.o = attention.v_proj, attention.o_proj
        self.q_norm = getattr(attention, "q_norm", None)
        self.k_norm = getattr(attention, "k_norm", None)
        self.size, self.scaling = attention.head_dim, attention.scaling

    def keys(self, x_D: Tensor, inputs: LayerInputs, angles: Angles) -> tuple[Tensor, Tensor]:
        """Keys and values after those of the cache, which the token's enter: [1, K, S, d]."""
        key, value = self._heads(self.k, self.k_norm, x_D), self._heads(self.v, None, x_D)
        return enter_keys(self.attention, key, value, inputs, angles, self.ops)

    def __call__(
        self, x_D: Tensor, residual_D: Tensor, inputs: LayerInputs, angles: Angles
    ) -> Tensor:
        """Residual stream after attention, [D]."""
        key, value = self.keys(x_D, inputs, angles)
        query = self.ops.rotate(self._heads(self.q, self.q_norm, x_D), angles)
        out_Hd = self.ops.attend_one(
            query[0, 0], key[0], value[0], inputs.attention_mask, self.scaling
        )
        return plus_product(residual_D, self.o, out_Hd.view(-1))

    def _heads(self, linear: nn.Linear, norm: Any, x_D: Tensor) -> Tensor:
        """[1, 1, heads, d]."""
        heads = product(linear, x_D).view(1, 1, -1, self.size)
        return heads if norm is None else norm(heads)


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
