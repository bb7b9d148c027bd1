# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Triton kernel of `linear_rows` and `linear_rows_add`, and of the first half of `swiglu_rows`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from methods.engine.ops.triton.jit import Tiles, Tuner, bucket, dot, jit, load, tl
from methods.engine.ops.triton.types import Partition

PREFILL = (
    Tiles(128, 128, 64, 8, 3),
    Tiles(128, 128, 64, 4, 4),
    Tiles(128, 64, 64, 8, 3),
    Tiles(64, 128, 64, 4, 4),
    Tiles(64, 64, 64, 4, 4),
)
WIDE = Tiles(128, 256, 64, 8, 3)
"""A further one for a single weight: tiles of two do not fit the shared memory of an H100."""
DECODE = (
    Tiles(16, 32, 128, 4, 4),
    Tiles(16, 16, 256, 4, 4),
    Tiles(16, 32, 256, 4, 3),
    Tiles(16, 64, 128, 4, 4),
)
MIDDLE = (Tiles(64, 32, 128, 4, 4), Tiles(64, 64, 64, 4, 4), Tiles(64, 128, 64, 4, 4))
"""From 17 to 64 rows the weights are still most of the traffic: narrow tiles, many programs."""
EXACT = (Tiles(64, 64, 32, 4, 3),)
"""Float32 without tensor cores: larger tiles only compile for minutes."""

tuner = Tuner()


def tile_choices(rows: int, dtype: torch.dtype, gated: bool) -> tuple[Tiles, ...]:
    """Candidates for a problem of so many rows at most, best guess first."""
    if dtype == torch.float32 and rows > 16:
        return EXACT
    if rows <= 64:
        return DECODE if rows <= 16 else MIDDLE
    return PREFILL if gated else (*PREFILL, WIDE)


@jit
def rows_kernel(
    x_ptr,
    index_ptr,
    count_ptr,
    weight_ptr,
    bias_ptr,
    up_ptr,
    up_bias_ptr,
    out_ptr,
    outputs,
    inputs,
    x_stride,
    weight_stride,
    up_stride,
    out_stride,
    GATHER: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INNER: tl.constexpr,
):
    """One tile of x @ weight, or of silu(x @ weight) * (x @ up); both share the gathered rows.

    The grid covers all rows, programs beyond `count` return. Gathered rows are stored compactly,
    compact ones are added to the rows of the index.
    """
    count = tl.load(count_ptr).to(tl.int32)
    row_tiles = tl.cdiv(count, ROWS)
    col_tiles = tl.cdiv(outputs, COLS)
    program = tl.program_id(0)
    if program >= row_tiles * col_tiles:
        return
    # eight row tiles share a weight tile while it is in L2
    in_group = 8 * col_tiles
    first = program // in_group * 8
    height = tl.minimum(row_tiles - first, 8)

    row = (first + program % in_group % height) * ROWS + tl.arange(0, ROWS)
    live = row < count
    place = tl.load(index_ptr + row, mask=live, other=0).to(tl.int64)
    x_row = place if GATHER else tl.where(live, row, 0).to(tl.int64)
    col = program % in_group // height * COLS + tl.arange(0, COLS)
    weight_row = (col % outputs).to(tl.int64)
    inner = tl.arange(0, INNER)
    x_tile = x_ptr + x_row[:, None] * x_stride + inner[None, :]
    weight_tile = weight_ptr + weight_row[None, :] * weight_stride + inner[:, None]
    if up_ptr is not None:
        up_tile = up_ptr + weight_row[None, :] * up_stride + inner[:, None]
        up = tl.zeros([ROWS, COLS], tl.float32)

    acc = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, inputs, INNER):
        deep = inner < inputs - start
        x = load(x_tile + start, deep[None, :], EVEN)
        acc = dot(x, load(weight_tile + start, deep[:, None], EVEN), acc, "ieee")
        if up_ptr is not None:
            up = dot(x, load(up_tile + start, deep[:, None], EVEN), up, "ieee")
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + weight_row).to(tl.float32)[None, :]
    if up_ptr is not None:
        if up_bias_ptr is not None:
            up += tl.load(up_bias_ptr + weight_row).to(tl.float32)[None, :]
        acc = acc / (1.0 + tl.exp(-acc)) * up

    out_row = row.to(tl.int64) if GATHER else place
    out_tile = out_ptr + out_row[:, None] * out_stride + col[None, :]
    inside = live[:, None] & (col[None, :] < outputs)
    if not GATHER:
        acc += tl.load(out_tile, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_tile, acc.to(out_ptr.dtype.element_ty), mask=inside)


def check_layout(**tensors: Tensor | None) -> None:
    """Raise ValueError if the last dimension of a tensor is not contiguous."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.stride(-1) != 1:
            raise ValueError(f"{name} must be contiguous in its last dimension")


@torch.compiler.disable
def launch_rows(
    x: Tensor,
    rows: Partition,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    out: Tensor,
    *,
    gather: bool,
    up: tuple[Tensor | None, Tensor | None] = (None, None),
) -> None:
    """Run the kernel: out[n] = linear(x[index[n]]) if `gather`, else out[index[n]] += linear(x[n]).

    Args:
        up: weight and bias of the second product of a gated MLP.
    """
    check_layout(x=x, weight=weight_OI, out=out, bias=bias_O, up=up[0], up_bias=up[1])
    number = len(rows.index_N)
    if number == 0:
        return
    outputs, inputs = weight_OI.shape
    gated = up[0] is not None

    def launch(tiles: Tiles, order: Partition, target: Tensor) -> None:
        rows_kernel[(-(-number // tiles.rows) * -(-outputs // tiles.cols),)](
            *(x, order.index_N, order.executed, weight_OI, bias_O, *up, target, outputs, inputs),
            *(x.stride(0), weight_OI.stride(0), 0 if up[0] is None else up[0].stride(0)),
            target.stride(0),
            GATHER=gather,
            EVEN=inputs % tiles.inner == 0,
            ROWS=tiles.rows,
            COLS=tiles.cols,
            INNER=tiles.inner,
            **tiles.options,
        )

    def trial() -> Any:
        index, every = torch.arange(number, device=x.device), torch.full_like(rows.executed, number)
        order = rows._replace(index_N=index, executed=every)
        target = out if gather else torch.empty_like(out)  # what is added to must not change
        return lambda tiles: launch(tiles, order, target)

    key = (bucket(number), outputs, inputs, x.dtype, x.device, gather, gated)
    launch(tuner.pick(key, tile_choices(number, x.dtype, gated), trial), rows, out)
