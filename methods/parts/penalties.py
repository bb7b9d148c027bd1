"""Losses that hold the realised sparsity near its target."""

from __future__ import annotations

from torch import Tensor


def sparsity_penalty(execute_rate: Tensor, sparsity: float, *, weight: float) -> Tensor:
    """weight * |(1 - sparsity) - mean execute rate| (informed routing, stage 2; SkipGPT)."""
    return weight * ((1.0 - sparsity) - execute_rate).abs()
