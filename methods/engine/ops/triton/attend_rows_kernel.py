# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Triton kernels of `attend`: online softmax (Milakov and Gimelshein, arXiv 1805.02867), tiled as
in FlashAttention-2 (Dao, arXiv 2307.08691), with the keys of a long cache split over programs for
few queries and reduced by a second kernel.
"""

from __future__ import annotations

from methods.engine.ops.triton.jit import dot, jit, tl


@jit
def over_keys(
    acc,
    peak,
    total,
    query,
    key_ptr,
    value_ptr,
    key_stride,
    key_width_stride,
    value_stride,
    value_width_stride,
    start,
    end,
    lower,
    visible,
    scale,
    width,
    MASKED: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Fold the slots start..end into the running softmax; MASKED where a query may not see all."""
    lane = tl.arange(0, WIDTH)
    for block in range(start, end, KEYS):
        slot = block + tl.arange(0, KEYS)
        far = slot.to(tl.int64)
        key_tile = key_ptr + far[None, :] * key_stride + lane[:, None] * key_width_stride
        value_tile = value_ptr + far[:, None] * value_stride + lane[None, :] * value_width_stride
        if MASKED:
            stored = slot < end
            inside = lane < width
            key = tl.load(key_tile, mask=stored[None, :] & inside[:, None], other=0.0)
            value = tl.load(value_tile, mask=stored[:, None] & inside[None, :], other=0.0)
        elif EVEN:
            key = tl.load(key_tile)
            value = tl.load(value_tile)
        else:
            inside = lane < width
            key = tl.load(key_tile, mask=inside[:, None], other=0.0)
            value = tl.load(value_tile, mask=inside[None, :], other=0.0)
        scores = dot(query, key, tl.zeros([ROWS, KEYS], tl.float32), "ieee") * scale
        if MASKED:
            seen = (slot[None, :] < visible[:, None]) & (slot[None, :] >= lower[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(scores - base[:, None])
        decay = tl.exp2(peak - base)
        total = total * decay + tl.sum(weight, 1)
        acc = dot(weight.to(value.dtype), value, acc * decay[:, None], "ieee")
        peak = higher
    return acc, peak, total


@jit(do_not_specialize=["past", "window"])
def attend_kernel(
    query_ptr,
    index_ptr,
    counts_ptr,
    starts_ptr,
    key_ptr,
    value_ptr,
    past,
    first_valid_ptr,
    first_ptr,
    out_ptr,
    part_ptr,
    peak_ptr,
    total_ptr,
    tokens,
    window,
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
    WINDOW: tl.constexpr,
    FIRST_VALID: tl.constexpr,
    FIRST: tl.constexpr,
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
    if FIRST:
        lower = tl.load(first_ptr + row, mask=live, other=0).to(tl.int32)
    else:
        if FIRST_VALID:
            lower += tl.load(first_valid_ptr + sequence).to(tl.int32)
        if WINDOW:
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
    # fmt: off
    acc, peak, total = over_keys(
        acc, peak, total, query, key_ptr, value_ptr, key_stride_s, key_stride_d, value_stride_s,
        value_stride_d, begin, full_from, lower, visible, scale, width, True,
        EVEN, ROWS, KEYS, WIDTH)
    acc, peak, total = over_keys(
        acc, peak, total, query, key_ptr, value_ptr, key_stride_s, key_stride_d, value_stride_s,
        value_stride_d, full_from, full_to, lower, visible, scale, width, False,
        EVEN, ROWS, KEYS, WIDTH)
    acc, peak, total = over_keys(
        acc, peak, total, query, key_ptr, value_ptr, key_stride_s, key_stride_d, value_stride_s,
        value_stride_d, full_to, end, lower, visible, scale, width, True,
        EVEN, ROWS, KEYS, WIDTH)
    # fmt: on
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
