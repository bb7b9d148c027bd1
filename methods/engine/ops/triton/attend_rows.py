"""Query-sparse causal attention: executed queries against the cache, compact or not."""

from __future__ import annotations

import torch
from torch import Tensor

from methods.engine.ops.choose import Kernels, use_triton


def attend(
    query_NHd: Tensor,
    index_N: Tensor,
    counts_B: Tensor,
    starts_B: Tensor,
    key_BKSd: Tensor,
    value_BKSd: Tensor,
    *,
    tokens: int,
    past: Tensor | int,
    scale: float,
    compact: bool = False,
    window: int | None = None,
    first_valid_B: Tensor | None = None,
    first_N: Tensor | None = None,
    kernels: Kernels = "auto",
) -> Tensor:
    """Attention of the executed queries of a forward over keys that are already in the cache.

    The i-th executed query of sequence b, of token t, sees the slots from `first` up to and
    including `past + t` (KV policy `keep`: a slot for every token) or, if `compact`, `past_b + i`
    (`evict`: a slot for every executed token). `past` counts the slots in use before this
    forward. Slots beyond are not read, so the cache may be longer than what is in use.

    Args:
        query_NHd: executed queries, compact: those of sequence b are the `counts_B[b]` rows from
            `starts_B[b]` on, in order of position; rows beyond the last may hold anything.
        index_N: place b * tokens + t of each row.
        counts_B, starts_B: integers on the device.
        key_BKSd, value_BKSd: the cache, any strides, in the dtype of the queries.
        tokens: T.
        past: number, 0-dim tensor (a static cache), or one for each sequence [B] (`evict`).
        scale: of the scores.
        compact: see above.
        window: a query sees the last `window` slots up to its own only; needs `keep`, where slots
            are positions.
        first_valid_B: first slot that is not (left) padding.
        first_N: first slot that each row sees, in place of `window` and `first_valid_B`: for a
            window over a compact cache.

    Returns:
        [N, H, d] in the dtype of the queries; rows of no executed query are undefined.

    Raises:
        ValueError: `window` with `compact` (give `first_N`), heads that do not divide.
    """
    if compact and window is not None:
        raise ValueError("a window over a compact cache needs first_N, the first slot of each row")
    if query_NHd.shape[1] % key_BKSd.shape[1]:
        raise ValueError(f"{query_NHd.shape[1]} heads over {key_BKSd.shape[1]} key-value heads")
    if use_triton(kernels, query_NHd):
        from methods.engine.ops.triton.attend_rows_launch import launch_attend as run
    else:
        run = attend_reference
    return run(
        query_NHd,
        index_N,
        counts_B,
        starts_B,
        key_BKSd,
        value_BKSd,
        tokens=tokens,
        past=past,
        scale=scale,
        compact=compact,
        window=window,
        first_valid_B=first_valid_B,
        first_N=first_N,
    )


def attend_reference(
    query_NHd: Tensor,
    index_N: Tensor,
    counts_B: Tensor,
    starts_B: Tensor,
    key_BKSd: Tensor,
    value_BKSd: Tensor,
    *,
    tokens: int,
    past: Tensor | int,
    scale: float,
    compact: bool,
    window: int | None,
    first_valid_B: Tensor | None,
    first_N: Tensor | None,
) -> Tensor:
    """`attend` in PyTorch, in float32, one sequence at a time; every row against every slot."""
    rows, heads, width = query_NHd.shape
    batch, kv_heads, slots, _ = key_BKSd.shape
    device = query_NHd.device
    place_N, slot_S = torch.arange(rows, device=device), torch.arange(slots, device=device)
    past_B = torch.as_tensor(past, device=device).expand(batch)
    out_NHd = torch.zeros_like(query_NHd)
    for b in range(batch):
        rank_N = place_N - starts_B[b]
        own_N = (rank_N >= 0) & (rank_N < counts_B[b])
        last_N = past_B[b] + (rank_N if compact else index_N[:rows] - b * tokens)
        lower_N = torch.zeros_like(last_N)
        if first_valid_B is not None:
            lower_N = lower_N + first_valid_B[b]
        if window is not None:
            lower_N = torch.maximum(lower_N, last_N - window + 1)
        if first_N is not None:
            lower_N = first_N
        seen_NS = (slot_S <= last_N[:, None]) & (slot_S >= lower_N[:, None])
        query = query_NHd.float().view(rows, kv_heads, heads // kv_heads, width)
        scores = torch.einsum("nkgd,ksd->nkgs", query, key_BKSd[b].float()) * scale
        scores = scores.masked_fill(~seen_NS[:, None, None], float("-inf"))
        used_S = (seen_NS & own_N[:, None]).any(0)
        value = value_BKSd[b].float().masked_fill(~used_S[:, None], 0)
        out = torch.einsum("nkgs,ksd->nkgd", scores.softmax(-1), value)
        out = out.reshape(rows, heads, width).to(query_NHd.dtype)
        out_NHd = torch.where(own_N[:, None, None], out, out_NHd)
    return out_NHd
