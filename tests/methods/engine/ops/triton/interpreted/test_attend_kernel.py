"""Query-sparse attention against softmax attention, one query after the other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from methods.engine.ops.triton import attend_rows_kernel
from methods.engine.ops.triton.attend_rows import attend
from methods.engine.ops.triton.route import partition_reference
from methods.engine.ops.triton.types import Sight
from tests.methods.engine.ops.triton.interpreted.conftest import close, draw, masks


def one_by_one(query, index, key, value, tokens, past, compact, window, first_valid, scale):
    """Each executed query by itself, in float32."""
    ratio, out, rank = query.shape[1] // key.shape[1], [], {}
    for row, place in enumerate(index.tolist()):
        b, t = divmod(place, tokens)
        i = rank[b] = rank.get(b, -1) + 1
        last = int(past[b]) + (i if compact else t)
        first = int(first_valid[b]) if first_valid is not None else 0
        first = first if window is None else max(first, last - window + 1)
        keys, values = (c[b, :, first : last + 1].float() for c in (key, value))
        q = query[row].float().view(key.shape[1], ratio, -1)
        weights = (torch.einsum("kgd,ksd->kgs", q, keys) * scale).softmax(-1)
        out.append(torch.einsum("kgs,ksd->kgd", weights, values).flatten(0, 1))
    return torch.stack(out) if out else query[:0].float()


def check(
    device,
    *,
    batch=2,
    tokens=20,
    past=9,
    heads=(4, 2),
    width=16,
    share=0.5,
    dtype=torch.float32,
    compact=False,
    window=None,
    padded=False,
    spare=0,
    past_as="int",
    seed=0,
):
    execute, valid = masks(batch, tokens, share, seed, device)
    if not padded:
        valid = torch.ones_like(valid)
    rows = partition_reference(execute, valid)
    count, slots = int(rows.executed), past + tokens + spare
    stored = torch.randint(0, past + 1, (batch,), generator=torch.Generator().manual_seed(seed))
    pasts = stored if past_as == "each" else torch.full((batch,), past)
    pads = (~valid).sum(1) + (0 if past == 0 else torch.arange(batch, device=device) % past)
    query = draw(batch * tokens, heads[0], width, seed=seed, dtype=dtype, device=device)
    query[count:] = float("nan")
    shape = (batch, slots, heads[1], width)
    key, value = (
        draw(*shape, seed=seed + i, dtype=dtype, device=device).transpose(1, 2) for i in (1, 2)
    )
    for b in range(batch):  # what lies beyond the last slot in use must not be read
        used = int(pasts[b]) + (int(rows.counts_B[b]) if compact else tokens)
        key[b, :, used:] = value[b, :, used:] = float("nan")
    given = {"int": past, "scalar": torch.tensor(past), "each": pasts}[past_as]
    sight = Sight(
        tokens,
        given if isinstance(given, int) else given.to(device),
        compact,
        window,
        pads if padded else None,
    )
    found = attend(query, rows, key, value, sight, scale=0.3, kernels="triton")
    expected = one_by_one(
        query, rows.index_N[:count], key, value, tokens, pasts, compact, window,
        pads if padded else None, 0.3,
    )  # fmt: skip
    assert close(found[:count], expected.to(dtype))


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    tokens=st.sampled_from([1, 2, 17, 33]),
    past=st.integers(0, 40),
    heads=st.sampled_from([(2, 2), (3, 1), (4, 1)]),
    share=st.sampled_from([0.0, 0.2, 0.8, 1.0]),
    window=st.sampled_from([None, 1, 6, 30]),
    padded=st.booleans(),
    spare=st.integers(0, 9),
    seed=st.integers(0, 99),
)
def test_keep(device, small_tiles, **drawn):
    check(device, **drawn)


@settings(max_examples=7, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    tokens=st.sampled_from([1, 3, 19, 34]),
    past=st.integers(0, 40),
    heads=st.sampled_from([(2, 2), (3, 1), (4, 1)]),
    share=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
def test_evict(device, small_tiles, **drawn):
    check(device, compact=True, past_as="each", **drawn)


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("width", [12, 24, 64, 128])
def test_head_widths(device, tokens, width, small_tiles):
    check(device, tokens=tokens, width=width)


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(device, tokens, dtype, small_tiles):
    check(device, tokens=tokens, dtype=dtype)


@pytest.mark.parametrize("compact", [False, True])
def test_keys_split_over_programs(device, compact, small_tiles, monkeypatch):
    """Some splits are empty: short sequences hold fewer blocks than there are splits."""
    monkeypatch.setattr(attend_rows_kernel, "splits_of", lambda *_: 4)
    past_as = "each" if compact else "int"
    check(device, batch=3, tokens=1, past=70, heads=(3, 1), compact=compact, past_as=past_as)
    check(device, batch=2, tokens=4, past=50, share=0.7, compact=compact, past_as=past_as)


def test_length_of_a_static_cache_on_the_device(device, small_tiles):
    check(device, tokens=1, past=30, spare=40, past_as="scalar", share=1.0)


def test_tiles_that_a_gpu_would_take(device):
    check(device, batch=1, tokens=150, past=30, heads=(2, 1), padded=True)
    check(device, batch=2, tokens=1, past=280, heads=(8, 2), width=64, share=1.0)


def test_first_slot_of_each_row(device, small_tiles):
    """A window over a compact cache, as the caller counts it."""
    execute = torch.ones(1, 6, dtype=torch.bool, device=device)
    rows = partition_reference(execute, execute)
    query, key, value = (
        draw(*shape, seed=i, device=device)
        for i, shape in enumerate([(6, 2, 16), (1, 1, 10, 16), (1, 1, 10, 16)])
    )
    first = torch.tensor([0, 2, 3, 3, 5, 9], device=device)
    sight = Sight(6, torch.tensor([4], device=device), compact=True, first_N=first)
    found = attend(query, rows, key, value, sight, scale=0.2, kernels="triton")
    for row, start in enumerate(first.tolist()):
        seen = slice(start, 5 + row)
        weights = (query[row] @ key[0, 0, seen].T * 0.2).softmax(-1)
        assert close(found[row], weights @ value[0, 0, seen])
