"""Attention and MLP of one token as products with vectors, in as few operations as they take.

Shapes: D model width, H heads, K key-value heads, d head size, S keys, F MLP width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from methods.engine.decoder.unit import LayerInputs
from methods.engine.ops.linear import all_linear
from methods.engine.ops.rotary import rotate
from methods.engine.ops.swiglu import NAMES, is_swiglu


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

    @staticmethod
    def covers(attention: Any) -> bool:
        """True if the module is such a one."""
        return all_linear(getattr(attention, f"{name}_proj", None) for name in "qkvo")

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
        query = self._heads(self.q, self.q_norm, x_D, inputs)
        out = functional.scaled_dot_product_attention(
            query.view(1, key.shape[1], -1, self.size),
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


class OneMlp:
    """down(silu(gate(x)) * up(x)) with plain linear layers."""

    def __init__(self, mlp: Any) -> None:
        self.gate, self.up, self.down = (getattr(mlp, name) for name in NAMES)

    @staticmethod
    def covers(mlp: Any) -> bool:
        """True if the module is such a one."""
        return is_swiglu(mlp) and all_linear(getattr(mlp, name) for name in NAMES)

    def __call__(self, x_D: Tensor, residual_D: Tensor) -> Tensor:
        """Residual stream after the MLP, [D]."""
        hidden_F = functional.silu(product(self.gate, x_D), inplace=True)
        return plus_product(residual_D, self.down, hidden_F.mul_(product(self.up, x_D)))


def product(linear: nn.Linear, x_D: Tensor) -> Tensor:
    """The layer's output for one vector."""
    if linear.bias is None:
        return torch.mv(linear.weight, x_D)
    return torch.addmv(linear.bias, linear.weight, x_D)


def plus_product(residual_D: Tensor, linear: nn.Linear, x: Tensor) -> Tensor:
    """The same added to a vector."""
    out = torch.addmv(residual_D, linear.weight, x)
    return out if linear.bias is None else out.add_(linear.bias)
