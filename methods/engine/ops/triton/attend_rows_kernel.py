# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Triton kernels of `attend`: online softmax (Milakov and Gimelshein, arXiv 1805.02867), tiled as
in FlashAttention-2 (Dao, arXiv 2307.08691), with the keys of a long cache split over programs for
few queries and reduced by a second kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from methods.engine.ops.triton.jit import (
    PROGRAMS,
    Tiles,
    Tuner,
    bucket,
    dot,
    floor_power,
    jit,
    lane_width,
    load,
    tl,
)
from methods.engine.ops.triton.types import Partition, Sight

PREFILL = (
    Tiles(128, 64, 0, 8, 3),
    Tiles(128, 128, 0, 8, 2),
    Tiles(64, 64, 0, 4, 3),
    Tiles(64, 128, 0, 4, 2),
)
"""rows: queries of a program; cols: keys of a step."""
DECODE = (Tiles(16, 64, 0, 4, 3), Tiles(16, 128, 0, 4, 2), Tiles(16, 32, 0, 2, 4))
FEW_TOKENS = 16
"""Up to here the query heads of one key-value head share a tile, and the keys are split."""
LOG2_E = 1.4426950408889634

tuner = Tuner()


@jit(do_not_specialize=["past", "window"])
def attend_kernel(
    query_ptr,
    index_ptr,
    counts_ptr,
    starts_ptr,
    key_ptr,
    value_ptr,
    past,
    window,
    first_valid_ptr,
    first_ptr,
    out_ptr,
    part_ptr,
    peak_ptr,
    total_ptr,
    tokens,
    scale,
    rows,
    heads,
    width,
    key_stride_b,
    key_stride_h,
    key_stride_s,
    key_stride_d,
    value_stride_b,
    value_stride_h,
    value_stride_s,
    value_stride_d,
    query_stride_n,
    query_stride_h,
    PAST: tl.constexpr,
    COMPACT: tl.constexpr,
    GROUP: tl.constexpr,
    PACK: tl.constexpr,
    SPLITS: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One tile of ROWS // PACK queries by PACK heads of one sequence, over one split of the keys.

    PACK is 1 (a program for each head) or holds the GROUP heads that share a key-value head.
    """
    sequence = tl.program_id(2) // SPLITS
    split = tl.program_id(2) % SPLITS
    QUERIES: tl.constexpr = ROWS // PACK
    count = tl.load(counts_ptr + sequence).to(tl.int32)
    tiles = tl.cdiv(count, QUERIES)
    if tl.program_id(0) >= tiles:
        return
    tile = tiles - 1 - tl.program_id(0)  # the longest key loops start first
    lane = tl.arange(0, ROWS)
    rank = tile * QUERIES + lane // PACK
    live = (rank < count) & (lane % PACK < GROUP)
    row = tl.load(starts_ptr + sequence).to(tl.int64) + tl.where(live, rank, 0)
    if PACK == 1:
        kv_head = tl.program_id(1) // GROUP
        head = tl.program_id(1) + lane * 0
    else:
        kv_head = tl.program_id(1)
        head = kv_head * GROUP + tl.where(live, lane % PACK, 0)

    if PAST == 0:
        before = past
    elif PAST == 1:
        before = tl.load(past).to(tl.int32)
    else:
        before = tl.load(past + sequence).to(tl.int32)
    if COMPACT:
        last = before + rank
    else:
        place = tl.load(index_ptr + row, mask=live, other=0)
        last = before + (place - sequence.to(tl.int64) * tokens).to(tl.int32)
    visible = tl.where(live, last + 1, 0)
    lower = lane * 0
    if first_ptr is not None:
        lower = tl.load(first_ptr + row, mask=live, other=0).to(tl.int32)
    else:
        if first_valid_ptr is not None:
            lower += tl.load(first_valid_ptr + sequence).to(tl.int32)
        if window is not None:
            lower = tl.maximum(lower, last + 1 - window)
    high = tl.max(visible, 0)
    low = tl.maximum(tl.min(tl.where(live, lower, high), 0), 0) // KEYS * KEYS
    share = tl.cdiv(tl.cdiv(tl.maximum(high - low, 0), KEYS), SPLITS) * KEYS
    begin = tl.minimum(low + split * share, high)
    end = tl.minimum(begin + share, high)
    seen_by_all = tl.min(tl.where(live, visible, high), 0) // KEYS * KEYS
    all_from = tl.cdiv(tl.maximum(tl.max(tl.where(live, lower, 0), 0), 0), KEYS) * KEYS
    full_from = tl.minimum(tl.maximum(all_from, begin), end)
    full_to = tl.minimum(tl.maximum(seen_by_all, full_from), end)

    deep = tl.arange(0, WIDTH)
    query = tl.load(
        query_ptr + row[:, None] * query_stride_n + head[:, None] * query_stride_h + deep[None, :],
        mask=live[:, None] & (deep[None, :] < width),
        other=0.0,
    )
    key_ptr += sequence.to(tl.int64) * key_stride_b + kv_head.to(tl.int64) * key_stride_h
    value_ptr += sequence.to(tl.int64) * value_stride_b + kv_head.to(tl.int64) * value_stride_h
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    peak = total - float("inf")
    within = deep < width
    # three stretches of keys: in the middle one every query of the tile sees every key
    for stretch in tl.static_range(3):
        start = begin if stretch == 0 else (full_from if stretch == 1 else full_to)
        stop = full_from if stretch == 0 else (full_to if stretch == 1 else end)
        for block in range(start, stop, KEYS):
            slot = block + tl.arange(0, KEYS)
            far = slot.to(tl.int64)
            key_tile = key_ptr + far[None, :] * key_stride_s + deep[:, None] * key_stride_d
            value_tile = value_ptr + far[:, None] * value_stride_s + deep[None, :] * value_stride_d
            if stretch == 1:
                key = load(key_tile, within[:, None], EVEN)
                value = load(value_tile, within[None, :], EVEN)
            else:
                stored = slot < stop
                key = load(key_tile, stored[None, :] & within[:, None], False)
                value = load(value_tile, stored[:, None] & within[None, :], False)
            scores = dot(query, key, tl.zeros([ROWS, KEYS], tl.float32), "ieee") * scale
            if stretch != 1:
                seen = (slot[None, :] < visible[:, None]) & (slot[None, :] >= lower[:, None])
                scores = tl.where(seen, scores, float("-inf"))
            higher = tl.maximum(peak, tl.max(scores, 1))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            weight = tl.exp2(scores - base[:, None])
            decay = tl.exp2(peak - base)
            total = total * decay + tl.sum(weight, 1)
            acc = dot(weight.to(value.dtype), value, acc * decay[:, None], "ieee")
            peak = higher
    inside = live[:, None] & (deep[None, :] < width)
    place = row * heads + head
    if SPLITS == 1:
        out = acc / tl.where(total == 0, 1.0, total)[:, None]
        tile_ptr = out_ptr + place[:, None] * width + deep[None, :]
        tl.store(tile_ptr, out.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        place += split.to(tl.int64) * rows * heads
        tl.store(part_ptr + place[:, None] * width + deep[None, :], acc, mask=inside)
        tl.store(peak_ptr + place, peak, mask=live)
        tl.store(total_ptr + place, total, mask=live)


@jit
def reduce_kernel(
    part_ptr,
    peak_ptr,
    total_ptr,
    counts_ptr,
    starts_ptr,
    out_ptr,
    batch,
    rows,
    heads,
    width,
    SPLITS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Join the splits of one row and head."""
    row = tl.program_id(0)
    executed = tl.load(starts_ptr + batch - 1) + tl.load(counts_ptr + batch - 1)
    if row >= executed:
        return
    place = row.to(tl.int64) * heads + tl.program_id(1)
    split = tl.arange(0, SPLITS).to(tl.int64) * rows * heads + place
    deep = tl.arange(0, WIDTH)
    peak = tl.load(peak_ptr + split)
    top = tl.max(peak, 0)
    weight = tl.exp2(peak - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weight * tl.load(total_ptr + split), 0)
    part = tl.load(
        part_ptr + split[:, None] * width + deep[None, :], mask=deep[None, :] < width, other=0.0
    )
    out = tl.sum(part * weight[:, None], 0) / tl.where(total == 0, 1.0, total)
    tl.store(out_ptr + place * width + deep, out.to(out_ptr.dtype.element_ty), mask=deep < width)


def splits_of(programs: int, slots: int) -> int:
    """Power of two that fills the device with work of at least 128 keys each."""
    wanted = min(max(PROGRAMS // programs, 1), max(slots // 128, 1), 64)
    return floor_power(wanted)


@torch.compiler.disable
def launch_attend(
    query_NHd: Tensor,
    rows: Partition,
    key_BKSd: Tensor,
    value_BKSd: Tensor,
    sight: Sight,
    scale: float,
) -> Tensor:
    """`attend` by the kernels; arguments as there."""
    number, heads, width = query_NHd.shape
    batch, kv_heads, slots, _ = key_BKSd.shape
    group, few = heads // kv_heads, sight.tokens <= FEW_TOKENS
    if query_NHd.stride(-1) != 1:
        query_NHd = query_NHd.contiguous()
    out = torch.empty(number, heads, width, dtype=query_NHd.dtype, device=query_NHd.device)
    pack = bucket(group) if few else 1
    if number == 0:
        return out

    def launch(tiles: Tiles, order: Partition) -> None:
        tall = max(tiles.rows, pack) if few else min(tiles.rows, lane_width(sight.tokens))
        query_tiles = -(-sight.tokens // (tall // pack))
        lead = kv_heads if few else heads
        splits = splits_of(query_tiles * lead * batch, slots) if few else 1
        places = splits * number * heads if splits > 1 else 0
        partial = query_NHd.new_empty(places * (width + 2), dtype=torch.float32)
        parts = partial.split([places * width, places, places])
        attend_kernel[(query_tiles, lead, batch * splits)](
            *(query_NHd, order.index_N, order.counts_B, order.starts_B, key_BKSd, value_BKSd),
            *(sight.past, sight.window, sight.first_valid_B, sight.first_N, out, *parts),
            *(sight.tokens, scale * LOG2_E, number, heads, width),
            *(*key_BKSd.stride(), *value_BKSd.stride(), *query_NHd.stride()[:2]),
            PAST=0 if isinstance(sight.past, int) else 1 + sight.past.dim(),
            COMPACT=sight.compact,
            GROUP=group,
            PACK=pack,
            SPLITS=splits,
            EVEN=width == lane_width(width),
            ROWS=tall,
            KEYS=tiles.cols,
            WIDTH=lane_width(width),
            **tiles.options,
        )
        if splits > 1:
            reduce_kernel[(number, heads)](
                *(*parts, order.counts_B, order.starts_B, out, batch, number, heads, width),
                SPLITS=splits,
                WIDTH=lane_width(width),
            )

    def trial() -> Any:
        order = rows
        if number == batch * sight.tokens:
            index = torch.arange(number, device=rows.index_N.device)
            every = torch.full_like(rows.counts_B, sight.tokens)
            order = rows._replace(index_N=index, counts_B=every, starts_B=index[:: sight.tokens])
        return lambda tiles: launch(tiles, order)

    sizes = (bucket(sight.tokens), bucket(slots), bucket(batch), heads, kv_heads, width)
    key = (*sizes, out.dtype, few, out.device)
    launch(tuner.pick(key, DECODE if few else PREFILL, trial), rows)
    return out
