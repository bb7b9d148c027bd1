"""Which tokens of a forward call are real, and their place among the real ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def valid_and_positions(
    attention_mask: Any, *, batch: int, tokens: int, past: int | Tensor, device: torch.device
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
        positions = (torch.arange(tokens, device=device) + past).expand(batch, tokens)
        return torch.ones(batch, tokens, dtype=torch.bool, device=device), positions
    if attention_mask.dim() == 4:
        return _from_square(attention_mask, tokens=tokens, past=past)
    if attention_mask.dim() != 2 or attention_mask.shape[1] < tokens:
        shape = tuple(attention_mask.shape)
        raise ValueError(f"attention_mask of shape {shape} does not cover {tokens} tokens")
    real = attention_mask.to(device) != 0
    positions = (real.long().cumsum(1) - 1).clamp_min(0)
    return real[:, -tokens:], positions[:, -tokens:]


def tokens_in(cache: Any) -> int | Tensor:
    """Length of a cache: a number, or its own 0-dim tensor while a CUDA graph is captured."""
    length = cache.get_seq_length()
    if isinstance(length, Tensor) and capturing():
        return length
    return int(length)


def capturing() -> bool:
    """True while a CUDA graph is captured: nothing may then be read on the host."""
    return bool(torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def leading_padding(attention_mask: Any) -> tuple[Tensor | None, bool]:
    """Padding slots before each sequence, int64 [B] or None, and whether that tells it all.

    It does if each sequence's real tokens are contiguous, and none of several new tokens follows
    a gap: then the visible keys of a query are one range. One transfer to the host a forward.
    """
    if attention_mask is None:
        return None, True
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        return None, False
    real = attention_mask != 0
    first = (real.cumsum(1) == 0).sum(1)
    end = real.shape[1] - (real.flip(1).cumsum(1) == 0).sum(1)
    whole = (end - first == real.sum(1)) | ~real.any(1)
    return first, bool(whole.all())


def _from_square(mask: Tensor, *, tokens: int, past: int | Tensor) -> tuple[Tensor, Tensor]:
    allowed = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
    diagonal = allowed.diagonal(offset=int(past), dim1=1, dim2=2)[:, :tokens]
    positions = (allowed.long().sum(-1) - 1).clamp_min(0)
    return diagonal, positions
