"""One unit of one forward call: what it reads, and how to run it for every token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from methods.base import Site
from methods.engine.decoder.families import LayerParts
from methods.engine.decoder.inputs import LayerInputs
from methods.engine.ops.row_ops import RowOps


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
    layer_input_BTD: Tensor | None = None
    """The residual stream that entered the layer, which nobody overwrites."""
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
        """Score the normalised input: times a vector, plus a 0-dim offset, float32 [B, T]."""
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

    def added(self, sublayer: Literal["attention", "mlp"], out: Tensor) -> Tensor:
        """What the residual stream gets of what a sublayer gave, [..., D]."""
        part = self.part
        norm = part.attention_after if sublayer == "attention" else part.mlp_after
        if norm is not None:
            out = self.ops.norm(norm, out)
        return out if part.multiplier == 1.0 else out * part.multiplier

    def run(self, inputs: LayerInputs | None = None) -> Tensor:
        """Execute for every token: the residual stream that leaves the unit, [B, T, D].

        Done once on the layer's own inputs, so that an oracle may look before the executor runs.

        Args:
            inputs: other than the layer's own.
        """
        if inputs is not None:
            return self.run_with(self.part.mlp, inputs)
        if self.after_BTD is None:
            self.after_BTD = self.run_with(self.part.mlp, self.inputs)
        return self.after_BTD

    def run_with(self, mlp: Callable[[Tensor], Tensor], inputs: LayerInputs) -> Tensor:
        """Execute for every token with this way of computing the MLP, whatever ran before."""
        if not self.attends:
            return self.residual_BTD + self.added("mlp", mlp(self.x_BTD))
        attended = self.part.attention(
            hidden_states=self.x_BTD,
            attention_mask=inputs.attention_mask,
            position_embeddings=inputs.position_embeddings,
            past_key_values=inputs.past_key_values,
            **inputs.others,
        )[0]
        after = self.residual_BTD + self.added("attention", attended)
        if self.site.kind == "block":
            after = after + self.added("mlp", mlp(self.part.mlp_norm(after)))
        return after
