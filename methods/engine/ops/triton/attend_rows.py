"""Query-sparse causal attention: executed queries against the cache, compact or not."""

from __future__ import annotations

import torch
from torch import Tensor

from methods.engine.ops.choose import Kernels, use_triton
from methods.engine.ops.triton.types import Partition, Sight


def attend(
    query_NHd: Tensor,
    rows: Partition,
    key_BKSd: Tensor,
    value_BKSd: Tensor,
    sight: Sight,
    *,
    scale: float,
    kernels: Kernels = "auto",
) -> Tensor:
    """Attend with the executed queries of a forward to keys that are already in the cache.

    Args:
        query_NHd: compact, in the order of `rows`; rows beyond the executed ones may hold anything.
        key_BKSd, value_BKSd: the cache, any strides, in the dtype of the queries.
        scale: of the scores.

    Returns:
        [N, H, d] in the dtype of the queries; rows of no executed query are undefined.

    Raises:
        ValueError: `window` with `compact` (give `first_N`), heads that do not divide.
    """
    if sight.compact and sight.window is not None:
        raise ValueError("a window over a compact cache needs first_N, the first slot of each row")
    if query_NHd.shape[1] % key_BKSd.shape[1]:
        raise ValueError(f"{query_NHd.shape[1]} heads over {key_BKSd.shape[1]} key-value heads")
    if use_triton(kernels, query_NHd):
        from methods.engine.ops.triton.attend_rows_kernel import launch_attend as run
    else:
        run = attend_reference
    return run(query_NHd, rows, key_BKSd, value_BKSd, sight, scale)


def attend_reference(
    query_NHd: Tensor,
    rows: Partition,
    key_BKSd: Tensor,
    value_BKSd: Tensor,
    sight: Sight,
    scale: float,
) -> Tensor:
    """`attend` in PyTorch, in float32, one sequence at a time; every row against every slot."""
    number, heads, width = query_NHd.shape
    batch, kv_heads, slots, _ = key_BKSd.shape
    device = query_NHd.device
    place_N, slot_S = torch.arange(number, device=device), torch.arange(slots, device=device)
    past_B = torch.as_tensor(sight.past, device=device).expand(batch)
    out_NHd = torch.zeros_like(query_NHd)
    for b in range(batch):
        rank_N = place_N - rows.starts_B[b]
        own_N = (rank_N >= 0) & (rank_N < rows.counts_B[b])
        token_N = rows.index_N[:number] - b * sight.tokens
        last_N = past_B[b] + (rank_N if sight.compact else token_N)
        lower_N = torch.zeros_like(last_N)
        if sight.first_valid_B is not None:
            lower_N = lower_N + sight.first_valid_B[b]
        if sight.window is not None:
            lower_N = torch.maximum(lower_N, last_N - sight.window + 1)
        if sight.first_N is not None:
            lower_N = sight.first_N
        seen_NS = (slot_S <= last_N[:, None]) & (slot_S >= lower_N[:, None])
        query = query_NHd.float().view(number, kv_heads, heads // kv_heads, width)
        scores = torch.einsum("nkgd,ksd->nkgs", query, key_BKSd[b].float()) * scale
        scores = scores.masked_fill(~seen_NS[:, None, None], float("-inf"))
        used_S = (seen_NS & own_N[:, None]).any(0)
        value = value_BKSd[b].float().masked_fill(~used_S[:, None], 0)
        out = torch.einsum("nkgs,ksd->nkgd", scores.softmax(-1), value)
        out = out.reshape(number, heads, width).to(query_NHd.dtype)
        out_NHd = torch.where(own_N[:, None, None], out, out_NHd)
    return out_NHd
