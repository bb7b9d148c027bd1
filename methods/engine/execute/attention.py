"""Attention of some queries: those of executed tokens, over the keys that the KV policy leaves.

`keep`: keys and values of every token; `evict`: of executed tokens only.

Shapes: B sequences, T tokens of this forward, N executed ones, H heads, K key-value heads, G heads
to each of those, M = N * G rows, d head size, S keys, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from methods.base import KVPolicy
from methods.engine.cache.evict import KeptKeys, layer_of
from methods.engine.cache.growing import PreallocatedLayer, held_layer
from methods.engine.decoder.inputs import LayerInputs
from methods.engine.ops.linear import all_linear, weight_of
from methods.engine.ops.rotary import Angles, angles_of
from methods.engine.ops.row_ops import RowOps
from methods.engine.ops.rows import Rows, take

BLOCK_QUERIES = 128
"""Most queries that share a key prefix: small blocks waste few masked scores, large few calls."""


@dataclass(frozen=True)
class SequenceKeys:
    """Keys of one sequence, and what its gathered queries see of them."""

    key_KSd: Tensor
    value_KSd: Tensor
    last_N: Tensor
    """int64: the last key that each query sees, rising."""
    mask: Callable[[slice, int], Tensor] | None = None
    """(queries, number of keys) -> bool or additive [queries, keys]; None means every key up to
    the last."""
    square: bool = False
    """True if query i sees the first i + 1 keys and there are no others."""


def attend_rows(
    attention: Any,
    x_BTD: Tensor,
    rows: Rows,
    inputs: LayerInputs,
    kv_policy: KVPolicy,
    ops: RowOps,
) -> Tensor:
    """Output of the attention module for `rows`, [N, D], in their order.

    Args:
        attention: `q_proj`, `k_proj`, `v_proj` or a `qkv_proj`, and `o_proj`; optional `q_norm`
            and `k_norm` over the head or over all heads.
        x_BTD: normalised input.

    Raises:
        ValueError: a cache that this path cannot follow.
    """
    x_ND = take(x_BTD, rows.index_N)
    angles_BT = angles_of(inputs.position_embeddings)
    angles = angles_BT.at(rows.index_N)
    if kv_policy != "evict":
        sequences = _kept_by_all(attention, x_BTD, rows, inputs, angles_BT, ops)
    else:
        sequences = _kept_by_executed(attention, x_ND, rows, inputs, angles, ops)
    if not rows.number:
        return x_BTD.new_zeros(0, x_BTD.shape[-1])
    query_NHd = rotated(attention, heads_of(attention, "q", x_ND, ops)[0], angles, ops)
    found: list[Tensor] = []
    start = 0
    for sequence in sequences:
        end = start + len(sequence.last_N)
        found += _attend(query_NHd[start:end], sequence, attention.scaling, ops, inputs.softcap)
        start = end
    out_NHd = found[0] if len(found) == 1 else torch.cat(found)
    return ops.linears([attention.o_proj], out_NHd.flatten(1))[0]


def _kept_by_all(
    attention: Any,
    x_BTD: Tensor,
    rows: Rows,
    inputs: LayerInputs,
    angles: Angles,
    ops: RowOps,
) -> Iterator[SequenceKeys]:
    """Policy `keep`: keys of every token, the cache's first; they enter it whatever follows."""
    key, value = keys_of_all(attention, x_BTD, inputs, angles, ops)
    # a window has dropped keys before the first, a static cache has empty slots after the last
    first = min(int(inputs.call.past), key.shape[2] - rows.tokens)
    return _split_by_sequence(key, value, first, rows, inputs.attention_mask)


def keys_of_all(
    attention: Any, x_BTD: Tensor, inputs: LayerInputs, angles: Angles, ops: RowOps
) -> tuple[Tensor, Tensor]:
    """Keys and values of every token, after those of the cache, which they enter: [B, K, S, d]."""
    key_BTKd, value_BTKd = heads_of(attention, "kv", x_BTD, ops)
    return enter_keys(attention, key_BTKd, value_BTKd, inputs, angles, ops)


def enter_keys(
    attention: Any,
    key_BTKd: Tensor,
    value_BTKd: Tensor,
    inputs: LayerInputs,
    angles: Angles,
    ops: RowOps,
) -> tuple[Tensor, Tensor]:
    """Turn the keys and let both enter the cache; all that it then holds, [B, K, S, d]."""
    cache, layer = inputs.past_key_values, attention.layer_idx
    held = held_layer(cache, layer)
    if isinstance(held, PreallocatedLayer):  # where they stay, without a copy in between
        key_slots, value_slots = held.extend(key_BTKd.transpose(1, 2))
        rotated(attention, key_BTKd, angles, ops, out=key_slots.transpose(1, 2))
        value_slots.copy_(value_BTKd.transpose(1, 2))
        assert held.keys is not None and held.values is not None
        return held.keys, held.values
    key_BTKd = rotated(attention, key_BTKd, angles, ops)
    key, value = key_BTKd.transpose(1, 2), value_BTKd.transpose(1, 2)
    return (key, value) if cache is None else cache.update(key, value, layer)


def _split_by_sequence(
    key: Tensor, value: Tensor, first: int, rows: Rows, mask: Tensor | None
) -> Iterator[SequenceKeys]:
    for b, places in rows.per_sequence():
        last_N = places + first if first else places
        if mask is None:
            yield SequenceKeys(key[b], value[b], last_N)
            continue

        def rows_of(part: slice, keys: int, b: int = b, places: Tensor = places) -> Tensor:
            return mask[b, 0].index_select(0, places[part])[:, :keys]

        yield SequenceKeys(key[b], value[b], last_N, rows_of)


def _kept_by_executed(
    attention: Any,
    x_ND: Tensor,
    rows: Rows,
    inputs: LayerInputs,
    angles: Angles,
    ops: RowOps,
) -> Iterator[SequenceKeys]:
    """Policy `evict`: keys of executed tokens only; a query sees those up to its own."""
    cache = inputs.past_key_values
    kept = KeptKeys() if cache is None else layer_of(cache, attention.layer_idx, KeptKeys)
    if not rows.number:
        kept.skip(rows)
        return iter(())
    key, value = heads_of(attention, "kv", x_ND, ops)
    before = kept.append(rotated(attention, key, angles, ops), value, rows)
    return _kept_sequences(kept, before, rows, inputs.window)


def _kept_sequences(
    kept: KeptKeys, before: list[int], rows: Rows, window: int | None
) -> Iterator[SequenceKeys]:
    assert kept.keys is not None and kept.values is not None and kept.places is not None
    for b, count in enumerate(rows.counts):
        if not count:
            continue
        held, places = kept.counts[b], kept.places[b]
        last = torch.arange(before[b], held, device=places.device)

        def in_window(
            part: slice, keys: int, own: Tensor = places[last], p: Tensor = places
        ) -> Any:
            assert window is not None
            return p[None, :keys] > own[part, None] - window

        hides = window is not None and window < kept.seen
        yield SequenceKeys(
            kept.keys[b, :, :held],
            kept.values[b, :, :held],
            last,
            mask=in_window if hides else None,
            square=before[b] == 0 and not hides,
        )


def _attend(
    query_NHd: Tensor,
    sequence: SequenceKeys,
    scale: float,
    ops: RowOps,
    softcap: float | None,
) -> Iterator[Tensor]:
    """Scaled dot products of one sequence, a block of queries against the keys up to its last."""
    key, value = sequence.key_KSd, sequence.value_KSd
    if sequence.mask is None and softcap is None:
        done = ops.attend(query_NHd, key, value, sequence.last_N, scale)
        if done is not None:
            yield done
            return
    if sequence.square and softcap is None:
        yield _dot(query_NHd, key, value, None, scale, True)
        return
    ends = sequence.last_N.tolist()
    mask_of = _mask_of(query_NHd, sequence, ends[-1] + 1)
    # blocks of about the same number of queries: a rest of a few would cost a call of its own
    size = -(-len(ends) // -(-len(ends) // BLOCK_QUERIES))
    for start in range(0, len(ends), size):
        part = slice(start, min(start + size, len(ends)))
        seen = ends[part.stop - 1] + 1
        mask_NS = mask_of(part, seen)
        seen_keys = key[:, :seen], value[:, :seen]
        if softcap is None:
            yield _dot(query_NHd[part], *seen_keys, mask_NS, scale, False)
        else:
            yield _dot_capped(query_NHd[part], *seen_keys, mask_NS, scale, softcap)


def _mask_of(
    like: Tensor, sequence: SequenceKeys, keys: int
) -> Callable[[slice, int], Tensor | None]:
    """What some queries see of the first keys: their sequence's own mask, and nothing later.

    Without an own mask it is additive, as the kernel takes it, and every row is the same edge
    between zeros and minus infinities, moved to the query's last key.
    """
    if sequence.mask is not None:
        return lambda part, seen: _own_mask(sequence, part, seen)
    if len(sequence.last_N) == 1:
        return lambda part, seen: None  # the keys end where its sight does
    edge_2S = like.new_zeros(2 * keys)
    edge_2S[keys:] = float("-inf")
    first_N = keys - 1 - sequence.last_N

    def rows_of(part: slice, seen: int) -> Tensor:
        return edge_2S.unfold(0, seen, 1).index_select(0, first_N[part])

    return rows_of


def _own_mask(sequence: SequenceKeys, part: slice, seen: int) -> Tensor:
    """The sequence's own mask for some queries, and causal, [queries, keys]."""
    assert sequence.mask is not None
    mask_NS: Tensor = sequence.mask(part, seen)
    last_N = sequence.last_N[part]
    causal_NS = torch.arange(seen, device=last_N.device) <= last_N[:, None]
    if mask_NS.dtype == torch.bool:
        return causal_NS & mask_NS
    return mask_NS.masked_fill(~causal_NS, torch.finfo(mask_NS.dtype).min)


def _dot(
    query_NHd: Tensor,
    key_KSd: Tensor,
    value_KSd: Tensor,
    mask_NS: Tensor | None,
    scale: float,
    causal: bool,
) -> Tensor:
    out = functional.scaled_dot_product_attention(
        query_NHd.transpose(0, 1)[None],
        key_KSd[None],
        value_KSd[None],
        attn_mask=None if mask_NS is None else mask_NS[None, None],
        scale=scale,
        is_causal=causal,
        enable_gqa=query_NHd.shape[1] != key_KSd.shape[0],
    )
    return out[0].transpose(0, 1)


def _dot_capped(
    query_NHd: Tensor,
    key_KSd: Tensor,
    value_KSd: Tensor,
    mask_NS: Tensor | None,
    scale: float,
    cap: float,
) -> Tensor:
    """The same with scores s bent to cap * tanh(s / cap) (Gemma 2), which no kernel here does."""
    kv_heads, _, size = key_KSd.shape
    query_KMd = query_NHd.view(len(query_NHd), kv_heads, -1, size).transpose(0, 1).flatten(1, 2)
    scores_KMS = torch.tanh(query_KMd @ key_KSd.mT * (scale / cap)) * cap
    scores_KNGS = scores_KMS.view(kv_heads, len(query_NHd), -1, key_KSd.shape[1])
    if mask_NS is not None:
        if mask_NS.dtype == torch.bool:
            mask_NS = scores_KMS.new_zeros(mask_NS.shape).masked_fill_(~mask_NS, float("-inf"))
        scores_KNGS = scores_KNGS + mask_NS[:, None]
    shares = torch.softmax(scores_KNGS, dim=-1, dtype=torch.float32).to(value_KSd.dtype)
    out_KMd = shares.flatten(1, 2) @ value_KSd
    return out_KMd.view(kv_heads, len(query_NHd), -1, size).transpose(0, 1).flatten(1, 2)


def heads_of(attention: Any, names: str, x: Tensor, ops: RowOps) -> list[Tensor]:
    """Projections (q, k, v) split into heads and normed: [..., D] -> [..., heads, d] each."""
    fused = getattr(attention, "qkv_proj", None)
    if fused is None:
        found = ops.linears([getattr(attention, f"{name}_proj") for name in names], x)
    else:
        found = [_part_of_fused(attention, name, x) for name in names]
    return [split_heads(attention, *pair) for pair in zip(names, found, strict=True)]


def _part_of_fused(attention: Any, name: str, x: Tensor) -> Tensor:
    fused, rows = attention.qkv_proj, rows_of_fused(attention, name)
    if not all_linear([fused]):
        projected: Tensor = fused(x)[..., rows]
        return projected
    bias = None if fused.bias is None else fused.bias[rows]
    return functional.linear(x, weight_of(fused)[rows], bias)


def rows_of_fused(attention: Any, name: str) -> slice:
    """Rows of `qkv_proj` that make the queries, the keys or the values."""
    keys = attention.config.num_key_value_heads * attention.head_dim
    queries = attention.config.num_attention_heads * attention.head_dim
    start = {"q": 0, "k": queries, "v": queries + keys}[name]
    return slice(start, start + (queries if name == "q" else keys))


def split_heads(attention: Any, name: str, projected: Tensor) -> Tensor:
    """[..., heads * d] -> [..., heads, d], normed where the family does: heads, or all at once."""
    norm = getattr(attention, f"{name}_norm", None)
    if norm is not None and norm.weight.shape[-1] != attention.head_dim:
        projected, norm = norm(projected), None
    number = projected.shape[-1] // attention.head_dim
    heads: Tensor = projected.view(*projected.shape[:-1], number, attention.head_dim)
    return heads if norm is None else norm(heads)


def rotated(
    attention: Any, x: Tensor, angles: Angles, ops: RowOps, out: Tensor | None = None
) -> Tensor:
    """Turn heads by their positions, [..., heads, d]; not in a layer without (SmolLM3)."""
    if getattr(attention, "use_rope", True):
        return ops.rotate(x, angles, out)
    return x if out is None else out.copy_(x)


def is_llama_like(attention: Any, inputs: LayerInputs) -> bool:
    """True if `q_proj`, `k_proj`, `v_proj` and `o_proj`, a norm of each head and a rotation of the
    whole head are all that the attention does."""
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    size, norms = attention.head_dim, (getattr(attention, n, None) for n in ("q_norm", "k_norm"))
    return (
        all(hasattr(attention, name) for name in names)
        and all(norm is None or norm.weight.shape[-1] == size for norm in norms)
        and bool(getattr(attention, "use_rope", True))
        and inputs.position_embeddings[0].shape[-1] == size
        and inputs.softcap is None
    )
