"""One unit of one forward call: what it reads, and how to run it for all tokens or for some."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from methods.base import KVPolicy, Site
from methods.engine.decoder.adapter import LayerParts
from methods.engine.execute.attention import attend_rows
from methods.engine.ops.row_ops import RowOps
from methods.engine.ops.rows import Rows, take
from methods.engine.ops.swiglu import swiglu, weights_for_few


@dataclass(slots=True)
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


@dataclass(slots=True)
class Unit:
    """One sublayer or block of one forward call."""

    site: Site
    part: LayerParts
    residual_BTD: Tensor
    norm: Any
    """The module that normalises the unit's input."""
    inputs: LayerInputs
    ops: RowOps
    owned: bool = False
    """True if nobody else holds the residual stream: it may be overwritten."""
    after_BTD: Tensor | None = None
    """What `run` gave on the layer's own inputs, once it was asked."""
    _x_BTD: Tensor | None = None

    @property
    def x_BTD(self) -> Tensor:
        """The unit's normalised input; made when first asked for, of the stream as it is then."""
        if self._x_BTD is None:
            self._x_BTD = self.ops.norm(self.norm, self.residual_BTD)
        return self._x_BTD

    def scores(self, score_D: Tensor, offset: Tensor) -> Tensor:
        """The normalised input times a vector, plus a 0-dim offset: float32 [B, T]."""
        if self._x_BTD is not None:
            return self.ops.scores(self._x_BTD, score_D, offset)
        self._x_BTD, scores_BT = self.ops.normed_scores(
            self.norm, self.residual_BTD, score_D, offset
        )
        return scores_BT

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
            return self._run(inputs, self.part.mlp)
        if self.after_BTD is None:
            self.after_BTD = self._run(self.inputs, self.part.mlp)
        return self.after_BTD

    def run_fast(self) -> Tensor:
        """The same to float tolerance, without the MLP's intermediates where nothing needs them."""
        if self.after_BTD is not None:
            return self.after_BTD
        return self._run(self.inputs, self._mlp_fast)

    def _run(self, given: LayerInputs, mlp: Callable[[Tensor], Tensor]) -> Tensor:
        if not self.attends:
            return self.residual_BTD + mlp(self.x_BTD)
        attended = self.part.attention(
            hidden_states=self.x_BTD,
            attention_mask=given.attention_mask,
            position_embeddings=given.position_embeddings,
            past_key_values=given.past_key_values,
            **given.others,
        )[0]
        after: Tensor = self.residual_BTD + attended
        if self.site.kind == "block":
            after = after + mlp(self.part.mlp_norm(after))
        return after

    def run_rows(self, rows: Rows, kv_policy: KVPolicy) -> Tensor:
        """Execute for these tokens only: what it adds to their residual stream, [N, D].

        K and V enter the cache for every token under `keep`, for these tokens under `evict`.
        """
        if not self.attends:
            return swiglu(self.part.mlp, self.x_BTD.flatten(0, 1), self.ops, rows.index_N)
        attended = attend_rows(
            self.part.attention, self.x_BTD, rows, self.inputs, kv_policy, self.ops
        )
        if self.site.kind == "attention":
            return attended
        middle = take(self.residual_BTD, rows.index_N) + attended
        return attended + self._mlp_fast(self.ops.norm(self.part.mlp_norm, middle))

    def add_mlp(self, rows: Rows, into_BTD: Tensor) -> bool:
        """into[rows] = residual[rows] + the MLP's output, as `RowOps.add`; False leaves it be."""
        weights = None
        if not self.attends:
            weights = weights_for_few(self.part.mlp, self.x_BTD, rows.number)
        if weights is None:
            return False
        self.ops.add_mlp(weights, self.x_BTD, self.residual_BTD, into_BTD, rows.index_N)
        return True

    def _mlp_fast(self, x: Tensor) -> Tensor:
        return swiglu(self.part.mlp, x.flatten(0, -2), self.ops).view_as(x)
