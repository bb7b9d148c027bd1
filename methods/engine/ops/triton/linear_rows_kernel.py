# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Triton kernel of `linear_rows` and `linear_rows_add`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from methods.engine.ops.triton.jit import Tiles, Tuner, bucket, dot, jit, tl

PREFILL = (
    Tiles(128, 128, 64, 8, 3),
    Tiles(128, 256, 64, 8, 3),
    Tiles(128, 128, 64, 4, 4),
    Tiles(64, 128, 64, 4, 4),
    Tiles(64, 64, 64, 4, 4),
)
DECODE = (
    Tiles(16, 16, 256, 4, 4),
    Tiles(16, 32, 256, 4, 3),
    Tiles(16, 32, 128, 4, 5),
    Tiles(16, 64, 128, 4, 4),
)
MIDDLE = (Tiles(64, 32, 128, 4, 4), Tiles(64, 64, 64, 4, 4), Tiles(64, 128, 64, 4, 4))
"""From 17 to 64 rows the weights are still most of the traffic: narrow tiles, many programs."""

EXACT = (Tiles(64, 64, 32, 4, 3),)
"""Float32 without tensor cores: larger tiles only compile for minutes."""

tuner = Tuner()


def tile_choices(rows: int, dtype: torch.dtype) -> tuple[Tiles, ...]:
    """Candidates for a problem of so many rows at most, best guess first."""
    if dtype == torch.float32 and rows > 16:
        return EXACT
    if rows <= 16:
        return DECODE
    return MIDDLE if rows <= 64 else PREFILL


@jit
def tile_of(program, row_tiles, col_tiles, GROUP: tl.constexpr):
    """Row and column tile of a program: GROUP row tiles share a weight tile while it is in L2."""
    in_group = GROUP * col_tiles
    first = program // in_group * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    return first + program % in_group % height, program % in_group // height


@jit
def rows_kernel(
    x_ptr,
    index_ptr,
    count_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    outputs,
    inputs,
    x_stride,
    weight_stride,
    out_stride,
    GATHER: tl.constexpr,
    ADD: tl.constexpr,
    BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INNER: tl.constexpr,
):
    """One tile of the product; the grid covers all rows, programs beyond `count` return."""
    count = tl.load(count_ptr).to(tl.int32)
    row_tiles = tl.cdiv(count, ROWS)
    col_tiles = tl.cdiv(outputs, COLS)
    program = tl.program_id(0)
    if program >= row_tiles * col_tiles:
        return
    row_tile, col_tile = tile_of(program, row_tiles, col_tiles, 8)

    row = row_tile * ROWS + tl.arange(0, ROWS)
    live = row < count
    place = tl.load(index_ptr + row, mask=live, other=0).to(tl.int64)
    x_row = place if GATHER else tl.where(live, row, 0).to(tl.int64)
    col = col_tile * COLS + tl.arange(0, COLS)
    weight_row = (col % outputs).to(tl.int64)
    inner = tl.arange(0, INNER)
    x_tile = x_ptr + x_row[:, None] * x_stride + inner[None, :]
    weight_tile = weight_ptr + weight_row[None, :] * weight_stride + inner[:, None]

    acc = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, inputs, INNER):
        if EVEN:
            a = tl.load(x_tile + start)
            b = tl.load(weight_tile + start)
        else:
            a = tl.load(x_tile + start, mask=inner[None, :] < inputs - start, other=0.0)
            b = tl.load(weight_tile + start, mask=inner[:, None] < inputs - start, other=0.0)
        acc = dot(a, b, acc, "ieee")
    if BIAS:
        acc += tl.load(bias_ptr + weight_row).to(tl.float32)[None, :]

    out_row = place if ADD else row.to(tl.int64)
    out_tile = out_ptr + out_row[:, None] * out_stride + col[None, :]
    inside = live[:, None] & (col[None, :] < outputs)
    if ADD:
        acc += tl.load(out_tile, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_tile, acc.to(out_ptr.dtype.element_ty), mask=inside)


def check_layout(**tensors: Tensor | None) -> None:
    """Raises ValueError if the last dimension of a tensor is not contiguous."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.stride(-1) != 1:
            raise ValueError(f"{name} must be contiguous in its last dimension")


@torch.compiler.disable
def launch_rows(
    x: Tensor,
    index_N: Tensor,
    count: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    out: Tensor,
    *,
    gather: bool,
    add: bool,
) -> None:
    """out (row n, or index[n] if `add`) = or += linear(x (row index[n] if `gather`, or n))."""
    check_layout(x=x, weight=weight_OI, residual=out, bias=bias_O)
    if len(index_N) == 0:
        return
    outputs, inputs = weight_OI.shape

    def launch(tiles: Tiles, index: Tensor, rows: Tensor, target: Tensor) -> None:
        grid = (-(-len(index) // tiles.rows) * -(-outputs // tiles.cols),)
        rows_kernel[grid](
            x,
            index,
            rows,
            weight_OI,
            bias_O,
            target,
            outputs,
            inputs,
            x.stride(0),
            weight_OI.stride(0),
            target.stride(0),
            GATHER=gather,
            ADD=add,
            BIAS=bias_O is not None,
            EVEN=inputs % tiles.inner == 0,
            ROWS=tiles.rows,
            COLS=tiles.cols,
            INNER=tiles.inner,
            **tiles.options,
        )

    def trial() -> Any:
        index, scratch = torch.arange(len(index_N), device=x.device), torch.empty_like(out)
        rows = torch.full_like(count, len(index_N))
        return lambda tiles: launch(tiles, index, rows, scratch)

    key = (bucket(len(index_N)), outputs, inputs, x.dtype, x.device, gather, add)
    launch(tuner.pick(key, tile_choices(len(index_N), x.dtype), trial), index_N, count, out)
