"""Order of the tokens by the kernel and by stable sorting."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from methods.engine.ops.triton import partition_kernel
from methods.engine.ops.triton.route import partition, partition_reference


def same(execute, valid) -> bool:
    found, expected = (
        partition(execute, valid, kernels="triton"),
        partition_reference(execute, valid),
    )
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(batch=st.integers(1, 5), tokens=st.integers(1, 40), data=st.data())
def test_equals_the_reference(device, batch, tokens, data):
    flags = st.lists(st.booleans(), min_size=batch * tokens, max_size=batch * tokens)
    execute, valid = (torch.tensor(data.draw(flags)).view(batch, tokens) for _ in range(2))
    assert same(execute.to(device), valid.to(device))


@pytest.mark.parametrize("share", [0.0, 1.0, 0.5])
def test_more_places_than_a_tile(device, share):
    execute = torch.rand(3, 1000) < share
    valid = torch.rand(3, 1000) < 0.9
    assert same(execute.to(device), valid.to(device))


def test_reads_a_batch_that_is_not_contiguous(device):
    execute, valid = torch.rand(20, 4) < 0.5, torch.rand(20, 4) < 0.8
    assert same(execute.T.to(device), valid.T.to(device))


def test_every_place_is_written(device, monkeypatch):
    """Scratch memory is not zero; what is left over would be an index out of range."""
    empty = torch.empty
    monkeypatch.setattr(
        partition_kernel.torch, "empty", lambda *size, **kw: empty(*size, **kw).fill_(-7)
    )
    execute = (torch.rand(2, 600) < 0.4).to(device)
    index = partition(execute, torch.ones_like(execute), kernels="triton").index_N
    assert torch.equal(index.sort().values, torch.arange(1200, device=device))
