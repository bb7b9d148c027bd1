# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Triton kernel of `partition`: one launch, each program counts what lies before its tile."""

from __future__ import annotations

import torch
from torch import Tensor

from methods.engine.ops.triton.jit import bucket, jit, tl
from methods.engine.ops.triton.types import Partition


@jit
def count_between(execute_ptr, valid_ptr, start, end, CHUNK: tl.constexpr):
    """Executed and bypassed tokens among the places start..end."""
    executed = tl.zeros([CHUNK], tl.int32)
    valid = tl.zeros([CHUNK], tl.int32)
    for chunk in range(start, end, CHUNK):
        place = chunk + tl.arange(0, CHUNK)
        real = tl.load(valid_ptr + place, mask=place < end, other=0) != 0
        run = (tl.load(execute_ptr + place, mask=place < end, other=0) != 0) & real
        executed += run.to(tl.int32)
        valid += real.to(tl.int32)
    total = tl.sum(executed, 0)
    return total, tl.sum(valid, 0) - total


@jit
def ranks(run, real, inside, executed_from, bypassed_from, padding_from):
    """Rank of each place of a tile, given those of its first executed, bypassed, padding place."""
    run_rank = executed_from + tl.cumsum(run.to(tl.int32), 0) - 1
    skip_rank = bypassed_from + tl.cumsum((real & (run == 0)).to(tl.int32), 0) - 1
    pad_rank = padding_from + tl.cumsum((inside & (real == 0)).to(tl.int32), 0) - 1
    return tl.where(run, run_rank, tl.where(real, skip_rank, pad_rank))


@jit
def partition_kernel(
    execute_ptr,
    valid_ptr,
    index_ptr,
    totals_ptr,
    counts_ptr,
    starts_ptr,
    places,
    tokens,
    tiles,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Programs below `tiles` order one tile of places; the others count one sequence each."""
    program = tl.program_id(0)
    if program >= tiles:
        sequence = program - tiles
        first = sequence * tokens
        before, _ = count_between(execute_ptr, valid_ptr, 0, first, CHUNK)
        own, _ = count_between(execute_ptr, valid_ptr, first, first + tokens, CHUNK)
        tl.store(starts_ptr + sequence, before.to(tl.int64))
        tl.store(counts_ptr + sequence, own.to(tl.int64))
        return
    start = program * TILE
    executed_before, bypassed_before = count_between(execute_ptr, valid_ptr, 0, start, CHUNK)
    executed_after, bypassed_after = count_between(execute_ptr, valid_ptr, start, places, CHUNK)
    executed = executed_before + executed_after
    bypassed = bypassed_before + bypassed_after
    if program == 0:
        tl.store(totals_ptr, executed.to(tl.int64))
        tl.store(totals_ptr + 1, bypassed.to(tl.int64))

    place = start + tl.arange(0, TILE)
    inside = place < places
    real = tl.load(valid_ptr + place, mask=inside, other=0) != 0
    run = (tl.load(execute_ptr + place, mask=inside, other=0) != 0) & real
    pad_before = start - executed_before - bypassed_before
    bypassed_from, padding_from = executed + bypassed_before, executed + bypassed + pad_before
    rank = ranks(run, real, inside, executed_before, bypassed_from, padding_from)
    tl.store(index_ptr + rank, place.to(tl.int64), mask=inside)


def new_partition(places: int, batch: int, device: torch.device) -> Partition:
    """An order that is yet to be written; `bypassed` lies behind `executed`."""
    empty = torch.empty(places + 2 + 2 * batch, dtype=torch.int64, device=device)
    index, totals, counts, starts = empty.split([places, 2, batch, batch])
    return Partition(index, totals[0], totals[1], counts, starts)


@torch.compiler.disable
def launch_partition(execute_BT: Tensor, valid_BT: Tensor, rows: Partition) -> None:
    """Write the order of these masks to `rows`."""
    batch, tokens = execute_BT.shape
    places = batch * tokens
    tile = min(bucket(places), 1024)
    tiles = -(-places // tile)
    masks = (mask.contiguous().view(torch.uint8) for mask in (execute_BT, valid_BT))
    partition_kernel[(tiles + batch,)](
        *(*masks, rows.index_N, rows.executed, rows.counts_B, rows.starts_B),
        *(places, tokens, tiles),
        TILE=tile,
        CHUNK=min(bucket(places), 2048),
    )
