"""Rotary positions of the tokens of one forward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Angles:
    """cos and sin of P places, and the place of each row."""

    cos_Pd: Tensor
    sin_Pd: Tensor
    place_N: Tensor | None = None
    """int64; None if row i has place i % P."""

    def at(self, places_N: Tensor) -> Angles:
        """Of some tokens of a batch: b * T + t -> their angles."""
        own = len(self.cos_Pd)
        return Angles(self.cos_Pd, self.sin_Pd, places_N % own)


def angles_of(position_embeddings: tuple[Tensor, Tensor]) -> Angles:
    """Of every token of a batch, in order.

    Args:
        position_embeddings: cos and sin, [B or 1, T, d]; 1 if all sequences share positions.
    """
    cos, sin = (angle.flatten(0, 1) for angle in position_embeddings)
    return Angles(cos, sin)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, halves paired (Su et al., arXiv 2104.09864).

    Where cos and sin are narrower than x, only so much of each head is turned.
    """
    width = cos.shape[-1]
    if width < x.shape[-1]:
        return torch.cat([rotate(x[..., :width], cos, sin), x[..., width:]], dim=-1)
    half = width // 2
    a, b = x[..., :half], x[..., half:]
    out = x * cos
    out[..., :half].addcmul_(b, sin[..., :half], value=-1)
    out[..., half:].addcmul_(a, sin[..., half:])
    return out
