# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Triton kernels of `route_and_forecast`.

The first reads x once and leaves partial sums of the score and of the forecaster's hidden layer,
over slices of D so that few rows fill the device too. The second adds the slices up, decides, and
gives bypassed rows their forecast; a tile of rows without any stops there. The hidden layer is
computed for executed rows as well: at rank 100 that is about 1 % of an attention unit's FLOPs, and
waiting for the score would cost another pass over x and another launch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from methods.base import LinearUnit
from methods.engine.ops.triton.jit import PROGRAMS, dot, floor_power, jit, lane_width, tl
from methods.engine.ops.triton.linear_rows_kernel import check_layout
from methods.engine.ops.triton.partition_kernel import launch_partition, new_partition, ranks
from methods.engine.ops.triton.types import Routed


@jit
def project_kernel(
    x_ptr,
    score_ptr,
    down_ptr,
    score_part_ptr,
    hidden_part_ptr,
    rows,
    width,
    slice_width,
    rank,
    x_stride,
    down_stride,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    RANK: tl.constexpr,
    INNER: tl.constexpr,
):
    """Partial x @ score and x @ down of ROWS rows over one slice of D."""
    part = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    x_row = tl.where(live, row, 0).to(tl.int64)
    lane = tl.arange(0, RANK)
    inner = tl.arange(0, INNER)
    score = tl.zeros([ROWS], tl.float32)
    hidden = tl.zeros([ROWS, RANK], tl.float32)
    first = part * slice_width
    for start in range(first, tl.minimum(first + slice_width, width), INNER):
        deep = start + inner
        x = tl.load(
            x_ptr + x_row[:, None] * x_stride + deep[None, :],
            mask=live[:, None] & (deep[None, :] < width),
            other=0.0,
        ).to(tl.float32)
        if score_ptr is not None:
            weight = tl.load(score_ptr + deep, mask=deep < width, other=0.0)
            score += tl.sum(x * weight[None, :], 1)
        if down_ptr is not None:
            down = tl.load(
                down_ptr + lane[None, :] * down_stride + deep[:, None],
                mask=(deep[:, None] < width) & (lane[None, :] < rank),
                other=0.0,
            )
            hidden = dot(x, down, hidden, PRECISION)
    place = part.to(tl.int64) * rows + row
    if score_ptr is not None:
        tl.store(score_part_ptr + place, score, mask=live)
    if down_ptr is not None:
        tl.store(
            hidden_part_ptr + place[:, None] * RANK + lane[None, :], hidden, mask=live[:, None]
        )


@jit
def order_single_tile(run, valid, row, rows, index_ptr, totals_ptr, counts_ptr, starts_ptr):
    """The partition of one tile that holds every row, a sequence each (decode)."""
    own = run.to(tl.int32)
    executed, real = tl.sum(own, 0), tl.sum(valid.to(tl.int32), 0)
    inside = row < rows
    rank = ranks(run, valid, inside, 0, executed, real)
    tl.store(index_ptr + rank, row.to(tl.int64), mask=inside)
    tl.store(counts_ptr + row, own.to(tl.int64), mask=inside)
    tl.store(starts_ptr + row, (tl.cumsum(own, 0) - own).to(tl.int64), mask=inside)
    tl.store(totals_ptr, executed.to(tl.int64))
    tl.store(totals_ptr + 1, (real - executed).to(tl.int64))


@jit
def decide_kernel(
    score_part_ptr,
    hidden_part_ptr,
    valid_ptr,
    given_ptr,
    reserved_ptr,
    offset_ptr,
    threshold_ptr,
    up_ptr,
    bias_ptr,
    down_bias_ptr,
    residual_ptr,
    scores_ptr,
    execute_ptr,
    index_ptr,
    totals_ptr,
    counts_ptr,
    starts_ptr,
    rows,
    width,
    rank,
    residual_stride,
    up_stride,
    PARTS: tl.constexpr,
    SILU: tl.constexpr,
    PRECISION: tl.constexpr,
    ORDER: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    RANK: tl.constexpr,
    INNER: tl.constexpr,
):
    """Decisions of ROWS rows, and COLS columns of the forecast of those that are bypassed."""
    column = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    valid = tl.load(valid_ptr + row, mask=live, other=0) != 0
    if given_ptr is None:
        score = tl.zeros([ROWS], tl.float32) + tl.load(offset_ptr).to(tl.float32)
        for part in range(PARTS):
            score += tl.load(score_part_ptr + part * rows + row, mask=live, other=0.0)
        run = score > tl.load(threshold_ptr).to(tl.float32)
        if reserved_ptr is not None:
            run = run | (tl.load(reserved_ptr + row, mask=live, other=0) != 0)
        run = run & valid
        if column == 0:
            tl.store(scores_ptr + row, score, mask=live)
    else:
        run = (tl.load(given_ptr + row, mask=live, other=0) != 0) & valid
    if column == 0:
        tl.store(execute_ptr + row, run.to(tl.uint8), mask=live)
        if ORDER:
            order_single_tile(run, valid, row, rows, index_ptr, totals_ptr, counts_ptr, starts_ptr)
    if up_ptr is not None:
        bypass = valid & (run == 0)
        if tl.sum(bypass.to(tl.int32), 0) == 0:
            return
        col = column * COLS + tl.arange(0, COLS)
        acc = tl.zeros([ROWS, COLS], tl.float32)
        for start in range(0, RANK, INNER):
            lane = start + tl.arange(0, INNER)
            hidden = tl.zeros([ROWS, INNER], tl.float32)
            for part in range(PARTS):
                place = (part * rows + row).to(tl.int64)
                hidden += tl.load(
                    hidden_part_ptr + place[:, None] * RANK + lane[None, :],
                    mask=bypass[:, None],
                    other=0.0,
                )
            if down_bias_ptr is not None:
                hidden += tl.load(down_bias_ptr + lane, mask=lane < rank, other=0.0)[None, :]
            if SILU:
                hidden = hidden / (1.0 + tl.exp(-hidden))
            up = tl.load(
                up_ptr + col[None, :].to(tl.int64) * up_stride + lane[:, None],
                mask=(col[None, :] < width) & (lane[:, None] < rank),
                other=0.0,
            )
            acc = dot(hidden, up, acc, PRECISION)
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + col, mask=col < width, other=0.0)[None, :]
        tile = residual_ptr + row.to(tl.int64)[:, None] * residual_stride + col[None, :]
        inside = bypass[:, None] & (col[None, :] < width)
        acc += tl.load(tile, mask=inside, other=0.0).to(tl.float32)
        tl.store(tile, acc.to(residual_ptr.dtype.element_ty), mask=inside)


def tile_sizes(rows: int, width: int, rank: int, exact: bool) -> tuple[int, int, int]:
    """Rows of a tile, slices of D, and columns of a forecast tile.

    Args:
        exact: products in float32 without tensor cores, whose operands all lie in registers.
    """
    tall = 64 if rank <= 128 else 32 if rank <= 256 else 16
    tile = min(tall, lane_width(rows))
    slices = max(min(PROGRAMS // -(-rows // tile), width // 128, 32), 1)
    return tile, floor_power(slices), 128 if rows > 64 and not exact else 64


@torch.compiler.disable
def launch_route(
    x_ND: Tensor,
    residual_ND: Tensor,
    valid_N: Tensor,
    linear: LinearUnit | None,
    threshold: Tensor | None,
    given_N: Tensor | None,
    tokens: int,
    *,
    reserved_N: Tensor | None = None,
) -> Routed:
    """`route_and_forecast`, or `forecast_bypassed` where the decisions are given."""
    score = offset = down = down_bias = up = bias = None
    if linear is not None:
        down, down_bias, up, bias = linear.down_rD, linear.down_bias_r, linear.up_Dr, linear.bias_D
        if given_N is None:
            score, offset = linear.score_D, linear.offset
    check_layout(x=x_ND, residual=residual_ND, down=down, up=up)
    number, width = x_ND.shape
    rank = 0 if down is None else len(down)
    lanes = lane_width(rank)
    exact = x_ND.dtype == torch.float32
    tile, slices, cols = tile_sizes(number, width, lanes, exact)
    row_tiles = -(-number // tile)
    inner = 64 if lanes <= 256 else 32
    floats = torch.empty(slices * number * (1 + lanes * (down is not None)), device=x_ND.device)
    score_part, hidden_part = floats[: slices * number], floats[slices * number :]
    scores, execute = x_ND.new_empty(number, dtype=torch.float32), valid_N.new_empty(number)
    valid_N = valid_N.contiguous()
    rows = new_partition(number, number // tokens, x_ND.device)
    order = tokens == 1 and row_tiles == 1
    shared = {
        "PRECISION": "ieee" if exact else "tf32",
        "ROWS": tile,
        "RANK": lanes,
        "num_warps": 8 if tile >= 64 else 4,
    }
    if score is not None or down is not None:
        project_kernel[(row_tiles, slices)](
            *(x_ND, score, down, score_part, hidden_part),
            *(number, width, -(-width // slices // inner) * inner, rank, x_ND.stride(0)),
            0 if down is None else down.stride(0),
            INNER=inner,
            num_stages=3,
            **shared,
        )
    decide_kernel[(row_tiles, 1 if up is None else -(-width // cols))](
        *(score_part, hidden_part, valid_N.view(torch.uint8)),
        *(None if m is None else m.contiguous().view(torch.uint8) for m in (given_N, reserved_N)),
        *(offset, threshold, up, bias, down_bias, residual_ND, scores, execute.view(torch.uint8)),
        *(rows.index_N, rows.executed, rows.counts_B, rows.starts_B),
        *(number, width, rank, residual_ND.stride(0)),
        0 if up is None else up.stride(0),
        PARTS=slices,
        SILU=linear is not None and linear.silu,
        ORDER=order,
        COLS=cols,
        INNER=min(lanes, 64),
        num_stages=2,
        **shared,
    )
    if not order:
        launch_partition(execute.view(-1, tokens), valid_N.view(-1, tokens), rows)
    return Routed(scores, execute, rows)
