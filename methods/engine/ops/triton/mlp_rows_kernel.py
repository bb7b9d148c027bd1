# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Triton kernel of the first half of `swiglu_rows`; the second is `linear_rows_add`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from methods.engine.ops.triton.jit import Tiles, Tuner, bucket, dot, jit, tl
from methods.engine.ops.triton.linear_rows_kernel import EXACT, check_layout, tile_of

PREFILL = (
    Tiles(128, 128, 64, 8, 3),
    Tiles(128, 64, 64, 8, 3),
    Tiles(128, 64, 64, 4, 3),
    Tiles(64, 128, 64, 8, 3),
    Tiles(64, 64, 64, 4, 4),
)
DECODE = (
    Tiles(16, 32, 128, 4, 4),
    Tiles(16, 16, 256, 4, 3),
    Tiles(16, 32, 256, 4, 3),
    Tiles(16, 64, 128, 4, 3),
)
MIDDLE = (Tiles(64, 32, 128, 4, 3), Tiles(64, 64, 64, 4, 4), Tiles(64, 128, 64, 8, 3))

tuner = Tuner()


def tile_choices(rows: int, dtype: torch.dtype) -> tuple[Tiles, ...]:
    """Candidates for a problem of so many rows at most, best guess first."""
    if dtype == torch.float32 and rows > 16:
        return EXACT
    if rows <= 16:
        return DECODE
    return MIDDLE if rows <= 64 else PREFILL


@jit
def swiglu_kernel(
    x_ptr,
    index_ptr,
    count_ptr,
    gate_ptr,
    up_ptr,
    gate_bias_ptr,
    up_bias_ptr,
    out_ptr,
    outputs,
    inputs,
    x_stride,
    gate_stride,
    up_stride,
    GATE_BIAS: tl.constexpr,
    UP_BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INNER: tl.constexpr,
):
    """silu(x[index] gate) * (x[index] up) of one tile; both products share the gathered rows."""
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
    col = col_tile * COLS + tl.arange(0, COLS)
    weight_row = (col % outputs).to(tl.int64)
    inner = tl.arange(0, INNER)
    x_tile = x_ptr + place[:, None] * x_stride + inner[None, :]
    gate_tile = gate_ptr + weight_row[None, :] * gate_stride + inner[:, None]
    up_tile = up_ptr + weight_row[None, :] * up_stride + inner[:, None]

    gate = tl.zeros([ROWS, COLS], tl.float32)
    up = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, inputs, INNER):
        if EVEN:
            x = tl.load(x_tile + start)
            gate = dot(x, tl.load(gate_tile + start), gate, "ieee")
            up = dot(x, tl.load(up_tile + start), up, "ieee")
        else:
            deep = inner[:, None] < inputs - start
            x = tl.load(x_tile + start, mask=inner[None, :] < inputs - start, other=0.0)
            gate = dot(x, tl.load(gate_tile + start, mask=deep, other=0.0), gate, "ieee")
            up = dot(x, tl.load(up_tile + start, mask=deep, other=0.0), up, "ieee")
    if GATE_BIAS:
        gate += tl.load(gate_bias_ptr + weight_row).to(tl.float32)[None, :]
    if UP_BIAS:
        up += tl.load(up_bias_ptr + weight_row).to(tl.float32)[None, :]

    out = gate / (1.0 + tl.exp(-gate)) * up
    out_tile = out_ptr + row.to(tl.int64)[:, None] * outputs + col[None, :]
    inside = live[:, None] & (col[None, :] < outputs)
    tl.store(out_tile, out.to(out_ptr.dtype.element_ty), mask=inside)


@torch.compiler.disable
def launch_swiglu(
    x_ND: Tensor,
    index_N: Tensor,
    count: Tensor,
    gate_FD: Tensor,
    up_FD: Tensor,
    gate_bias_F: Tensor | None,
    up_bias_F: Tensor | None,
) -> Tensor:
    """Compact silu(gate) * up of the gathered rows, [N, F]; undefined from `count` on."""
    check_layout(x=x_ND, gate=gate_FD, up=up_FD, gate_bias=gate_bias_F, up_bias=up_bias_F)
    outputs, inputs = gate_FD.shape
    out_NF = x_ND.new_empty(len(index_N), outputs)
    if len(index_N) == 0:
        return out_NF

    def launch(tiles: Tiles, index: Tensor, rows: Tensor) -> None:
        grid = (-(-len(index) // tiles.rows) * -(-outputs // tiles.cols),)
        swiglu_kernel[grid](
            x_ND,
            index,
            rows,
            gate_FD,
            up_FD,
            gate_bias_F,
            up_bias_F,
            out_NF,
            outputs,
            inputs,
            x_ND.stride(0),
            gate_FD.stride(0),
            up_FD.stride(0),
            GATE_BIAS=gate_bias_F is not None,
            UP_BIAS=up_bias_F is not None,
            EVEN=inputs % tiles.inner == 0,
            ROWS=tiles.rows,
            COLS=tiles.cols,
            INNER=tiles.inner,
            **tiles.options,
        )

    def trial() -> Any:
        index = torch.arange(len(index_N), device=x_ND.device)
        rows = torch.full_like(count, len(index_N))
        return lambda tiles: launch(tiles, index, rows)

    key = (bucket(len(index_N)), outputs, inputs, x_ND.dtype, x_ND.device)
    launch(tuner.pick(key, tile_choices(len(index_N), x_ND.dtype), trial), index_N, count)
    return out_NF
