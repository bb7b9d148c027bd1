"""Which tokens of a forward call are real, and their place among the real ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def valid_and_positions(
    attention_mask: Any, *, batch: int, tokens: int, past: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Validity and position of the current tokens.

    Args:
        attention_mask: None, [B, past + T] with nonzero for real tokens, or a prepared
            [B, 1, T, S] mask (or a dict of such): a token is real if it may attend to itself.
        batch: B.
        tokens: T, current tokens only.
        past: tokens already in the cache.

    Returns:
        valid_BT bool, positions_BT int64 (index among the sequence's real tokens, from 0).

    Raises:
        ValueError: a mask of another shape.
    """
    if isinstance(attention_mask, dict):
        attention_mask = next(iter(attention_mask.values()))
    if attention_mask is None:
        positions = torch.arange(past, past + tokens, device=device).expand(batch, tokens)
        return torch.ones(batch, tokens, dtype=torch.bool, device=device), positions
    if attention_mask.dim() == 4:
        return _from_square(attention_mask, tokens=tokens, past=past)
    if attention_mask.dim() != 2 or attention_mask.shape[1] < tokens:
        shape = tuple(attention_mask.shape)
        raise ValueError(f"attention_mask of shape {shape} does not cover {tokens} tokens")
    real = attention_mask.to(device) != 0
    positions = (real.long().cumsum(1) - 1).clamp_min(0)
    return real[:, -tokens:], positions[:, -tokens:]


def _from_square(mask: Tensor, *, tokens: int, past: int) -> tuple[Tensor, Tensor]:
    allowed = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
    diagonal = allowed.diagonal(offset=past, dim1=1, dim2=2)[:, :tokens]
    positions = (allowed.long().sum(-1) - 1).clamp_min(0)
    return diagonal, positions
