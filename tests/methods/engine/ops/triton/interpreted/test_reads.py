"""Which memory the kernels read: nothing of a weight that no executed token needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from methods.base import LinearUnit, SwiGLU
from methods.engine.ops.choose import interpreting
from methods.engine.ops.triton.attend_rows import attend
from methods.engine.ops.triton.linear_rows import linear_rows, linear_rows_add, swiglu_rows
from methods.engine.ops.triton.route import route_and_forecast
from methods.engine.ops.triton.types import Partition, Sight
from tests.methods.engine.ops.triton.interpreted.conftest import draw
from tests.methods.engine.ops.triton.launches import first

pytestmark = pytest.mark.skipif(not interpreting(), reason="addresses are seen by the interpreter")


@contextmanager
def reads(monkeypatch) -> Iterator[list]:
    """Addresses that the kernels load inside."""
    from triton.runtime.interpreter import InterpreterBuilder

    seen, load = [], InterpreterBuilder.create_masked_load

    def watched(self, ptrs, mask, *rest):
        seen.append(torch.from_numpy(ptrs.data[mask.data].astype("int64").ravel()))
        return load(self, ptrs, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", watched)
    yield seen


def touched(seen: list, tensor: torch.Tensor) -> int:
    """How many loads fall into the tensor's memory."""
    addresses = torch.cat(seen)
    start = tensor.data_ptr()
    end = start + tensor.untyped_storage().nbytes()
    return int(((addresses >= start) & (addresses < end)).sum())


@pytest.mark.parametrize("count", [0, 3])
@pytest.mark.parametrize("rows", [4, 30])
def test_weights_are_read_only_if_a_row_executes(count, rows, monkeypatch):
    x, order = draw(rows, 32, seed=0), first(torch.arange(rows), torch.tensor(count))
    gate, up, down, one = (draw(32, 32, seed=i) for i in range(4))
    with reads(monkeypatch) as seen:
        swiglu_rows(x, x.clone(), order, SwiGLU(gate, up, down), kernels="triton")
        compact = linear_rows(x, order, one, kernels="triton")
        linear_rows_add(compact, x.clone(), order, one, kernels="triton")
    assert [touched(seen, w) > 0 for w in (gate, up, down, one)] == [count > 0] * 4


@pytest.mark.parametrize("threshold", [-1e9, 1e9])
def test_the_forecast_of_executed_rows_is_not_made(threshold, monkeypatch):
    x, weight = draw(8, 32, seed=0), draw(32, seed=1)
    down, up = draw(4, 32, seed=2), draw(32, 4, seed=3)
    linear = LinearUnit(weight, torch.tensor(0.0), down_rD=down, up_Dr=up)
    valid, bound = torch.ones(8, dtype=torch.bool), torch.tensor(threshold)
    with reads(monkeypatch) as seen:
        route_and_forecast(x, x.clone(), valid, linear, bound, tokens=4, kernels="triton")
    assert (touched(seen, up) > 0) == (threshold > 0)


def test_the_cache_of_a_bypassed_sequence_is_not_read(monkeypatch):
    counts, one = torch.tensor([0, 1]), torch.tensor(1)
    rows = Partition(torch.tensor([1, 0]), one, one, counts, torch.tensor([0, 0]))
    keys = [draw(1, 1, 40, 16, seed=i) for i in range(2)]
    cache = torch.cat(keys)
    with reads(monkeypatch) as seen:
        query, sight = draw(2, 2, 16, seed=3), Sight(1, 39)
        attend(query, rows, cache, cache.clone(), sight, scale=1.0, kernels="triton")
    addresses = torch.cat(seen) - cache.data_ptr()
    first = (addresses >= 0) & (addresses < cache[0].numel() * 4)
    second = (addresses >= cache[0].numel() * 4) & (addresses < cache.numel() * 4)
    assert not first.any() and second.any()
