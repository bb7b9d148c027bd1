# mypy: disable-error-code="untyped-decorator"
"""Launches the kernels of `attend`: tile sizes, and how the keys are split."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from methods.engine.ops.triton.attend_rows_kernel import attend_kernel, reduce_kernel
from methods.engine.ops.triton.jit import Tiles, Tuner, bucket, floor_power, lane_width

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
PROGRAMS = 264
"""Programs that fill an H100 twice over."""
LOG2_E = 1.4426950408889634

tuner = Tuner()


def splits_of(programs: int, slots: int) -> int:
    """Power of two that fills the device with work of at least 128 keys each."""
    wanted = min(max(PROGRAMS // programs, 1), max(slots // 128, 1), 64)
    return floor_power(wanted)


@torch.compiler.disable
def launch_attend(
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
    """`attend` by the kernels; arguments as there."""
    rows, heads, width = query_NHd.shape
    batch, kv_heads, slots, _ = key_BKSd.shape
    group, few = heads // kv_heads, tokens <= FEW_TOKENS
    if query_NHd.stride(-1) != 1:
        query_NHd = query_NHd.contiguous()
    out = torch.empty(rows, heads, width, dtype=query_NHd.dtype, device=query_NHd.device)
    pack = bucket(group) if few else 1
    if rows == 0:
        return out

    def launch(tiles: Tiles, counts: Tensor, starts: Tensor, index: Tensor) -> None:
        tall = max(tiles.rows, pack) if few else min(tiles.rows, lane_width(tokens))
        query_tiles = -(-tokens // (tall // pack))
        lead = kv_heads if few else heads
        splits = splits_of(query_tiles * lead * batch, slots) if few else 1
        partial = query_NHd.new_empty(
            (splits, rows, heads, width + 2) if splits > 1 else (0,), dtype=torch.float32
        ).flatten()
        places = splits * rows * heads if splits > 1 else 0
        part, peak, total = partial.split([places * width, places, places])
        attend_kernel[(query_tiles, lead, batch * splits)](
            query_NHd,
            index,
            counts,
            starts,
            key_BKSd,
            value_BKSd,
            past,
            first_valid_B,
            first_N,
            out,
            part,
            peak,
            total,
            tokens,
            window or 0,
            scale * LOG2_E,
            rows,
            heads,
            width,
            *key_BKSd.stride(),
            *value_BKSd.stride(),
            query_NHd.stride(0),
            query_NHd.stride(1),
            PAST=0 if isinstance(past, int) else 1 + past.dim(),
            COMPACT=compact,
            WINDOW=window is not None,
            FIRST_VALID=first_valid_B is not None,
            FIRST=first_N is not None,
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
            reduce_kernel[(rows, heads)](
                part, peak, total, counts, starts, out, batch, rows, heads, width,
                SPLITS=splits, WIDTH=lane_width(width),
            )  # fmt: skip

    def trial() -> Any:
        index, starts, counts = index_N, starts_B, counts_B
        if rows == batch * tokens:
            index = torch.arange(rows, device=index_N.device)
            counts, starts = torch.full_like(counts_B, tokens), index[::tokens]
        return lambda tiles: launch(tiles, counts, starts, index)

    key = (bucket(tokens), bucket(slots), bucket(batch), heads, kv_heads, width, out.dtype, few)
    tiles = tuner.pick((*key, out.device), DECODE if few else PREFILL, trial)
    launch(tiles, counts_B, starts_B, index_N)
    return out
