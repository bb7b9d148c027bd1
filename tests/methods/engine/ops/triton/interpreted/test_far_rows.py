"""Rows that lie further apart than 32 bits count, as those of a large batch do.

Eight sequences of 8192 tokens at MLP width 14336 are 0.94e9 elements, twice that at batch 16. The
memory between the rows is never touched, so that it is never there.
"""

from __future__ import annotations

import pytest
import torch

from methods.base import LinearUnit, SwiGLU
from methods.engine.ops.triton.attend_rows import attend
from methods.engine.ops.triton.linear_rows import linear_rows, linear_rows_add, swiglu_rows
from methods.engine.ops.triton.route import route_and_forecast
from methods.engine.ops.triton.types import Partition, Sight
from tests.methods.engine.ops.triton.interpreted.conftest import close, draw
from tests.methods.engine.ops.triton.launches import first

APART = 2**30 + 8
ROWS, WIDTH = 4, 16

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has no such memory")


def far(values: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """The same values, neighbours along `dim` 2**30 elements apart."""
    strides = list(torch.empty(values.shape).stride())
    strides[dim] = APART
    last = (values.shape[dim] - 1) * APART
    memory = torch.empty(last + values.numel() + 64, dtype=torch.bfloat16)
    return memory.as_strided(values.shape, strides).copy_(values)


@pytest.fixture(scope="module")
def rows():
    return draw(ROWS, WIDTH, seed=0, dtype=torch.bfloat16)


@pytest.fixture
def order():
    return first(torch.tensor([3, 2, 0, 1]), torch.tensor(2))


def test_gathered_rows(rows, order, small_tiles):
    weight = draw(24, WIDTH, seed=1, dtype=torch.bfloat16)
    found = linear_rows(far(rows), order, weight, kernels="triton")[:2]
    assert close(found, linear_rows(rows, order, weight, kernels="torch")[:2])


def test_rows_that_are_added_to(rows, order, small_tiles):
    weight, into = draw(WIDTH, WIDTH, seed=1, dtype=torch.bfloat16), far(rows)
    expected = rows.clone()
    linear_rows_add(rows, into, order, weight, kernels="triton")
    linear_rows_add(rows, expected, order, weight, kernels="torch")
    assert close(into, expected)


def test_mlp_rows(rows, order, small_tiles):
    weights = SwiGLU(*(draw(WIDTH, WIDTH, seed=s, dtype=torch.bfloat16) for s in (1, 2, 3)))
    expected, into = rows.clone(), far(rows)
    swiglu_rows(far(rows), into, order, weights, kernels="triton")
    swiglu_rows(rows, expected, order, weights, kernels="torch")
    assert close(into, expected)


def test_routed_and_forecast_rows(rows):
    maps = LinearUnit(
        draw(WIDTH, seed=1),
        torch.zeros(()),
        down_rD=draw(4, WIDTH, seed=2),
        up_Dr=draw(WIDTH, 4, seed=3),
    )
    valid, threshold = torch.ones(ROWS, dtype=torch.bool), torch.zeros(())
    expected, into = rows.clone(), far(rows)
    call = {"tokens": ROWS}
    found = route_and_forecast(far(rows), into, valid, maps, threshold, **call, kernels="triton")
    reference = route_and_forecast(rows, expected, valid, maps, threshold, **call, kernels="torch")
    assert torch.equal(found.execute_N, reference.execute_N) and close(into, expected)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_keys_of_a_large_cache(dim, small_tiles):
    """Sequences, heads and slots far apart in turn."""
    query = draw(6, 3, 16, seed=1, dtype=torch.bfloat16)
    key, value = (draw(3, 3, 4, 16, seed=s, dtype=torch.bfloat16) for s in (2, 3))
    counts = torch.full((3,), 2)
    order = Partition(
        torch.arange(6), torch.tensor(6), torch.tensor(0), counts, counts.cumsum(0) - 2
    )
    call = (order, Sight(2, 2))
    far_key, far_value = far(key, dim), far(value, dim)
    found = attend(query, call[0], far_key, far_value, call[1], scale=0.25, kernels="triton")
    assert close(found, attend(query, call[0], key, value, call[1], scale=0.25, kernels="torch"))
