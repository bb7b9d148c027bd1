"""Attention that no token runs has no keys and values, but the cache must keep its length."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def hold_place(attention: Any, hidden_BTD: Tensor, past_key_values: Any) -> None:
    """Write zeros for the tokens of a dropped first layer.

    Transformers reads the number of past tokens off the first layer of the cache; other layers
    stay empty.

    Args:
        attention: the dropped module.
        hidden_BTD: what enters its layer.
        past_key_values: the cache, or None.
    """
    if past_key_values is None or attention.layer_idx != 0:
        return
    batch, tokens, _ = hidden_BTD.shape
    heads = attention.config.num_key_value_heads
    zeros = hidden_BTD.new_zeros(batch, heads, tokens, attention.head_dim)
    past_key_values.update(zeros, zeros, attention.layer_idx)
