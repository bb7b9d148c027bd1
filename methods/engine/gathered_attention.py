"""Attention of some queries: keys and values for every token (KV policy `keep`), the rest not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from methods.engine.rows import Rows, queries_before, take

BLOCK_QUERIES = 128
"""Queries that share a key prefix: small blocks waste few masked scores, large ones few calls."""


def attend_rows(
    attention: Any,
    x_BTD: Tensor,
    rows: Rows,
    *,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **_: Any,
) -> Tensor:
    """Output of the attention module for `rows`, [N, D], in their order.

    K and V of all tokens enter the cache, as in the module itself; queries, scores and the output
    projection are computed for the gathered tokens only.

    Args:
        attention: of a Llama-like layer: `q_proj`, `k_proj`, `v_proj`, `o_proj`, optional
            `q_norm` and `k_norm` over the head.
        x_BTD: normalised input.
        position_embeddings: cos and sin of rotary positions, [B or 1, T, head_dim].
        attention_mask: None (causal) or [B, 1, T, keys], bool or additive.

    Raises:
        ValueError: a mask of another shape (a kernel of its own needs it).
    """
    key, value = _keys_and_values(attention, x_BTD, position_embeddings)
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, attention.layer_idx)
    if attention_mask is not None and attention_mask.dim() != 4:
        raise ValueError("mode=gathered needs attn_implementation sdpa or eager")
    if len(rows.index_N) == 0:
        return x_BTD.new_zeros(0, x_BTD.shape[-1])
    query_NHd = _queries(attention, x_BTD, rows, position_embeddings)
    out = torch.empty_like(query_NHd)
    start = 0
    for sequence, places in rows.per_sequence():
        mask = None if attention_mask is None else attention_mask[sequence, 0]
        for part in places.split(BLOCK_QUERIES):
            end = start + len(part)
            out[start:end] = _block(
                query_NHd[start:end],
                key[sequence],
                value[sequence],
                part,
                rows.tokens,
                mask,
                scale=attention.scaling,
            )
            start = end
    projected: Tensor = attention.o_proj(out.flatten(1))
    return projected


def _keys_and_values(
    attention: Any, x_BTD: Tensor, position_embeddings: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Rotated keys and values of every token, [B, KV heads, T, head_dim]."""
    shape = (*x_BTD.shape[:-1], -1, attention.head_dim)
    key = _normed(attention, "k_norm", attention.k_proj(x_BTD).view(shape)).transpose(1, 2)
    value = attention.v_proj(x_BTD).view(shape).transpose(1, 2)
    cos, sin = (angle.unsqueeze(1) for angle in position_embeddings)
    return _rotate(key, cos, sin), value


def _queries(
    attention: Any, x_BTD: Tensor, rows: Rows, position_embeddings: tuple[Tensor, Tensor]
) -> Tensor:
    """Rotated queries of the gathered tokens, [N, heads, head_dim]."""
    query = attention.q_proj(take(x_BTD, rows.index_N))
    query = _normed(attention, "q_norm", query.view(len(query), -1, attention.head_dim))
    batch = x_BTD.shape[0]
    cos, sin = (
        take(angle.expand(batch, -1, -1), rows.index_N).unsqueeze(1)
        for angle in position_embeddings
    )
    return _rotate(query, cos, sin)


def _block(
    query_NHd: Tensor,
    key_KSd: Tensor,
    value_KSd: Tensor,
    places_N: Tensor,
    tokens: int,
    mask_TS: Tensor | None,
    *,
    scale: float,
) -> Tensor:
    """Attention of queries of one sequence over the keys that the last of them may see."""
    keys = key_KSd.shape[1]
    if mask_TS is None:
        seen = keys - tokens + int(places_N[-1]) + 1
        mask = queries_before(keys, places_N, tokens)[:, :seen] if len(places_N) > 1 else None
    else:
        seen = keys
        mask = mask_TS[places_N, :keys]
    out = functional.scaled_dot_product_attention(
        query_NHd.transpose(0, 1)[None],
        key_KSd[None, :, :seen],
        value_KSd[None, :, :seen],
        attn_mask=None if mask is None else mask[None, None],
        scale=scale,
        enable_gqa=query_NHd.shape[1] != key_KSd.shape[0],
    )
    return out[0].transpose(0, 1)


def _normed(attention: Any, name: str, heads: Tensor) -> Tensor:
    norm = getattr(attention, name, None)
    normed: Tensor = heads if norm is None else norm(heads)
    return normed


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, halves paired (Su et al., arXiv 2104.09864)."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin
