"""One unit of one forward call: what it reads, and how to run it for all tokens or for some."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from methods.base import KVPolicy, Site
from methods.engine.adapter import LayerParts
from methods.engine.gathered_attention import attend_rows, keys_of_all
from methods.engine.rows import Rows, take


@dataclass(frozen=True)
class LayerInputs:
    """What a decoder layer was given beside the residual stream."""

    position_embeddings: tuple[Tensor, Tensor]
    """cos and sin of the rotary positions, [B or 1, T, head_dim]."""
    attention_mask: Tensor | None
    """None (causal), or [B, 1, T, keys], bool or additive."""
    past_key_values: Any
    past: int | Tensor
    """Tokens that the cache held when the forward began; a tensor while a graph is captured."""
    window: int | None
    """Sliding-window size of this layer's attention, if it has one."""
    others: dict[str, Any]
    """Further keyword arguments, for the attention module itself."""

    def masked_by(self, attention_mask: Tensor) -> LayerInputs:
        """The same with another attention mask."""
        return replace(self, attention_mask=attention_mask)


@dataclass
class Unit:
    """One sublayer or block of one forward call."""

    site: Site
    part: LayerParts
    residual_BTD: Tensor
    x_BTD: Tensor
    """The unit's normalised input."""
    inputs: LayerInputs
    after_BTD: Tensor | None = None
    """What `run` gave on the layer's own inputs, once it was asked."""

    @property
    def attends(self) -> bool:
        """True for an attention unit and for a block."""
        return self.site.kind != "mlp"

    def run(self, inputs: LayerInputs | None = None) -> Tensor:
        """Execute for every token: the residual stream that leaves the unit, [B, T, D].

        Done once on the layer's own inputs, so that an oracle may look before the executor runs.

        Args:
            inputs: other than the layer's own.
        """
        if inputs is not None:
            return self._run(inputs)
        if self.after_BTD is None:
            self.after_BTD = self._run(self.inputs)
        return self.after_BTD

    def _run(self, given: LayerInputs) -> Tensor:
        if not self.attends:
            return self.residual_BTD + self._mlp(self.x_BTD)
        attended = self.part.attention(
            hidden_states=self.x_BTD,
            attention_mask=given.attention_mask,
            position_embeddings=given.position_embeddings,
            past_key_values=given.past_key_values,
            **given.others,
        )[0]
        after: Tensor = self.residual_BTD + attended
        if self.site.kind == "block":
            after = after + self._mlp(self.part.mlp_norm(after))
        return after

    def run_rows(self, rows: Rows, kv_policy: KVPolicy) -> Tensor:
        """Execute for these tokens only: what it adds to their residual stream, [N, D].

        K and V enter the cache for every token under `keep`, for these tokens under `evict`.
        """
        if not self.attends:
            return self._mlp_rows(take(self.x_BTD, rows.index_N))
        attended = attend_rows(self.part.attention, self.x_BTD, rows, self.inputs, kv_policy)
        if self.site.kind == "attention":
            return attended
        middle = take(self.residual_BTD, rows.index_N) + attended
        return attended + self._mlp_rows(self.part.mlp_norm(middle))

    def _mlp_rows(self, x_ND: Tensor) -> Tensor:
        return swiglu(self.part.mlp, x_ND) if len(x_ND) else x_ND

    def write_keys(self) -> None:
        """Let K and V of every token enter the cache, and compute nothing else (policy `keep`)."""
        if self.inputs.past_key_values is not None:
            keys_of_all(self.part.attention, self.x_BTD, self.inputs)

    def _mlp(self, x: Tensor) -> Tensor:
        delta: Tensor = self.part.mlp(x)
        return delta


def normed(norm: Any, x: Tensor) -> Tensor:
    """The norm of a layer; for one token in one operation, where the module takes six.

    Equal to float tolerance in float32, which the modules of the known families compute in.
    """
    one = x.dtype == torch.float32 and x.numel() == x.shape[-1] and not torch.is_grad_enabled()
    if one and type(norm).__name__.endswith("RMSNorm") and hasattr(norm, "variance_epsilon"):
        return functional.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)
    out: Tensor = norm(x)
    return out


def is_swiglu(mlp: Any) -> bool:
    """True for down(silu(gate(x)) * up(x)), by the names that the known families use."""
    silu = type(getattr(mlp, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")
    return silu and all(hasattr(mlp, f"{name}_proj") for name in ("gate", "up", "down"))


def swiglu(mlp: Any, x_ND: Tensor) -> Tensor:
    """The MLP on gathered rows, [N, D], with its intermediates in place where nothing needs them.

    At thousands of rows the intermediates are larger than the caches; writing each once instead
    of three times is a quarter of the time of the module's own forward.
    """
    if not is_swiglu(mlp) or torch.is_grad_enabled():
        delta: Tensor = mlp(x_ND)
        return delta
    hidden = functional.silu(mlp.gate_proj(x_ND), inplace=True)
    down: Tensor = mlp.down_proj(hidden.mul_(mlp.up_proj(x_ND)))
    return down
