"""Compiled loops against the PyTorch operations that they stand for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from methods.base import LinearUnit, SwiGLU
from methods.engine.ops.cpu import compiled
from methods.engine.ops.cpu.build import reason_without
from methods.engine.ops.cpu.compiled import CompiledRowOps
from methods.engine.ops.linear import transposed
from methods.engine.ops.rotary import Angles
from methods.engine.ops.row_ops import RowOps
from methods.engine.routed import routed
from methods.engine.routing import routing_of
from tests.methods.conftest import small_ids, small_model
from tests.methods.engine.scripted import Scripted, all_sites, random_maps, random_tables

pytestmark = pytest.mark.skipif(reason_without() is not None, reason="no C compiler")

PLAIN = RowOps()


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def ops():
    return CompiledRowOps()


def refuse(*_, **__):
    raise AssertionError("the PyTorch operation ran")


@pytest.fixture
def alone(monkeypatch):
    """The operations, without the PyTorch ones to fall back to."""
    names = ("norm", "normed_scores", "scores", "silu_mul", "mlp", "add_mlp", "rotate", "split")
    for name in (*names, "add", "forecast"):
        monkeypatch.setattr(RowOps, name, refuse)
    return CompiledRowOps()


def same(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("rows", [1, 7, 100])
@pytest.mark.parametrize("width", [1, 15, 576])
def test_norm(rows, width, alone):
    module = LlamaRMSNorm(width, eps=1e-5)
    module.weight.data = torch.randn(width)
    x = 10 * torch.randn(2, rows, width)
    same(alone.norm(module, x), module(x))


@pytest.mark.parametrize("width", [1, 15, 576])
def test_scores_with_the_norm(width, alone):
    module, x = LlamaRMSNorm(width, eps=1e-5), torch.randn(2, 7, width)
    module.weight.data = torch.randn(width)
    score, offset = torch.randn(width), torch.tensor(0.7)
    normed, scores = alone.normed_scores(module, x, score, offset)
    same(normed, module(x))
    same(scores, (module(x).double() @ score.double() + 0.7).float(), 1e-4)


def test_silu_mul_over_the_whole_range(alone):
    gate = torch.cat([torch.linspace(-100, 100, 4001), torch.tensor([0.0, -0.0, 3e38, -3e38])])
    up = torch.randn(len(gate))
    # of the double: at -3e38 float32 has no answer to compare with
    expected = (torch.nn.functional.silu(gate.double()) * up).float()
    found = alone.silu_mul(gate.clone(), up)
    same(found[:-1], expected[:-1])
    assert found.isfinite().all()
    broken = alone.silu_mul(torch.tensor([float("nan"), 1.0]), torch.ones(2))
    assert broken.isnan().tolist() == [True, False]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    count=st.sampled_from([1, 6, 16, 17, 64, 65, 150, 400]),
    width=st.sampled_from([5, 64, 576]),
    neurons=st.sampled_from([1, 50, 1536, 3300]),
    gathered=st.booleans(),
    seed=st.integers(0, 99),
)
def test_mlp(count, width, neurons, gathered, seed):
    """Short tiles, short vectors, one task and many, and sums over more than one part."""
    torch.manual_seed(seed)
    weights = swiglu_weights(width, neurons)
    x = torch.randn(450 if gathered else count, width)
    index = torch.randperm(450)[:count].sort().values if gathered else None
    expected = mlp_in_double(weights, x if index is None else x[index])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RowOps, "mlp", refuse)
        same(CompiledRowOps().mlp(weights, x, index), expected)


def swiglu_weights(width, neurons):
    shapes = ((neurons, width), (neurons, width), (width, neurons))
    return SwiGLU(*(torch.randn(shape) / shape[1] ** 0.5 for shape in shapes))


def mlp_in_double(weights, x):
    gate, up, down = (weight.double() for weight in weights)
    hidden = torch.nn.functional.silu(x.double() @ gate.t()) * (x.double() @ up.t())
    return (hidden @ down.t()).float()


@pytest.mark.parametrize("in_place", [False, True])
def test_add_mlp(in_place, alone):
    weights, x = swiglu_weights(48, 100), torch.randn(2, 30, 48)
    residual, index = torch.randn(2, 30, 48), torch.arange(0, 60, 3)
    expected = residual.flatten(0, 1).clone()
    expected[index] += mlp_in_double(weights, x.flatten(0, 1)[index])
    into = residual if in_place else residual.clone()
    alone.add_mlp(weights, x, residual, into, index)
    same(into.flatten(0, 1), expected)


def test_an_mlp_of_many_rows_is_the_librarys(ops, monkeypatch):
    monkeypatch.setattr(compiled, "MOST_PACKED", 20 * 8)
    weights, x = swiglu_weights(8, 24), torch.randn(21, 8)
    same(ops.mlp(weights, x), mlp_in_double(weights, x))
    monkeypatch.setattr(RowOps, "mlp", refuse)
    ops.mlp(weights, x[:20])
    with pytest.raises(AssertionError, match="PyTorch"):
        ops.mlp(weights, x)


@pytest.mark.parametrize(("batch", "shared"), [(1, True), (3, True), (3, False)])
@pytest.mark.parametrize("gathered", [False, True])
def test_rotate(batch, shared, gathered, ops):
    tokens, heads, size = 11, 3, 8
    angle = torch.randn(1 if shared else batch, tokens, size).flatten(0, 1)
    angles = Angles(angle.cos(), angle.sin())
    x = torch.randn(batch, tokens, heads, size)
    if gathered:
        index = torch.randperm(batch * tokens)[:9].sort().values
        x, angles = x.flatten(0, 1)[index], angles.at(index)
    assert not torch.equal(ops.rotate(x, angles), x)
    same(ops.rotate(x, angles), PLAIN.rotate(x, angles))
    room = torch.zeros(*x.shape[:-3], heads, x.shape[-3] + 4, size)
    slots = room.narrow(-2, 3, x.shape[-3]).transpose(-3, -2)
    for made in (ops.rotate(x, angles, out=slots), PLAIN.rotate(x, angles, out=slots.clone())):
        same(made, ops.rotate(x, angles))
    assert not room.narrow(-2, 0, 3).any() and not room.narrow(-2, -1, 1).any()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 4), st.integers(1, 20), st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 99))
def test_split(batch, tokens, share, seed):
    generator = torch.Generator().manual_seed(seed)
    execute, valid = (torch.rand(batch, tokens, generator=generator) < p for p in (share, 0.8))
    rows, bypassed = CompiledRowOps().split(execute & valid, valid)
    expected, others = PLAIN.split(execute & valid, valid)
    assert rows.index_N.tolist() == expected.index_N.tolist()
    assert (rows.counts, rows.tokens) == (expected.counts, expected.tokens)
    assert bypassed.tolist() == others.tolist()


def test_add(alone):
    into, index = torch.randn(2, 30, 5), torch.arange(0, 60, 3)
    delta = torch.randn(len(index), 5)
    expected = into.flatten(0, 1).index_add(0, index, delta).view_as(into)
    out = torch.full_like(into, float("nan"))
    alone.add(into, out, index, delta)
    written = out.flatten(0, 1)
    same(written[index], expected.flatten(0, 1)[index])
    assert written.isnan().any(1).sum() == 60 - len(index)
    alone.add(into, into, index, delta)
    same(into, expected)


def test_output_buffer(ops):
    residual = torch.randn(2, 3, 4)
    assert torch.equal(ops.output_buffer(residual, filled=False), residual)
    for filled in (False, True):
        made = ops.output_buffer(residual, filled=filled)
        assert made.shape == residual.shape and made.data_ptr() != residual.data_ptr()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    keys=st.sampled_from([8, 63, 64, 65, 300, 700]),
    queries=st.integers(8, 60),
    heads=st.sampled_from([(1, 1), (3, 1), (9, 3), (4, 4)]),
    size=st.sampled_from([16, 64, 80, 256]),
    layout=st.sampled_from(["cache", "projection"]),
    seed=st.integers(0, 99),
)
def test_attend(keys, queries, heads, size, layout, seed):
    """Any rising bounds, two queries at one key included, at scores of every size."""
    generator = torch.Generator().manual_seed(seed)

    def made(*shape):
        return 3 * torch.randn(*shape, generator=generator)

    number, shared = heads
    last = torch.randint(0, keys, (queries,), generator=generator).sort().values
    query = made(queries, number, size)
    if layout == "cache":
        key, value = (made(shared, keys + 9, size)[:, :keys] for _ in range(2))
    else:
        key, value = (made(keys, shared, size).transpose(0, 1) for _ in range(2))
    found = CompiledRowOps().attend(query, key, value, last, 0.2)
    groups = query.double().view(queries, shared, -1, size)
    scores = torch.einsum("nkgd,ksd->nkgs", groups, key.double()) * 0.2
    scores = scores.masked_fill(torch.arange(keys) > last[:, None, None, None], float("-inf"))
    expected = torch.einsum("nkgs,ksd->nkgd", scores.softmax(-1), value.double())
    assert found is not None
    same(found, expected.reshape(queries, number, size).float(), 2e-4)


@pytest.mark.parametrize("layout", ["cache", "projection"])
@pytest.mark.parametrize(("heads", "shared"), [(1, 1), (6, 2), (4, 4)])
@pytest.mark.parametrize(("keys", "size"), [(1, 16), (40, 24), (9000, 128)])
def test_attend_one(keys, size, heads, shared, layout, monkeypatch):
    """In one thread and, where there are many keys, in several."""
    query = 3 * torch.randn(heads, size)
    if layout == "cache":
        key, value = (torch.randn(shared, keys + 9, size)[:, :keys] for _ in range(2))
    else:
        key, value = (torch.randn(keys, shared, size).transpose(0, 1) for _ in range(2))
    monkeypatch.setattr(RowOps, "attend_one", refuse)
    found = CompiledRowOps().attend_one(query, key, value, None, 0.2)
    groups = query.double().view(shared, -1, size)
    weights = (groups @ key.double().mT * 0.2).softmax(-1)
    same(found, (weights @ value.double()).reshape(heads, size).float(), 2e-4)


def test_attend_one_under_a_mask_takes_the_pytorch_way(ops):
    query, key, seen = torch.randn(2, 16), torch.randn(2, 5, 16), [True, False, True, True, False]
    mask = torch.tensor(seen).view(1, 1, 1, 5)
    found = ops.attend_one(query, key, key, mask, 0.3)
    same(found, ops.attend_one(query, key[:, seen], key[:, seen], None, 0.3))


def test_attention_that_no_loop_covers(ops):
    def asked(queries=9, size=16, dtype=torch.float32):
        query, key = (torch.randn(n, m, size, dtype=dtype) for n, m in ((queries, 2), (2, 20)))
        return ops.attend(query, key, key, torch.arange(queries), 1.0)

    assert asked() is not None
    assert asked(queries=1) is None and asked(size=24) is None and asked(size=272) is None
    assert asked(dtype=torch.bfloat16) is None


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    count=st.integers(0, 40),
    width=st.sampled_from([16, 80, 576]),
    rank=st.sampled_from([16, 64, 96, 512]),
    biases=st.booleans(),
    silu=st.booleans(),
)
def test_forecast(count, width, rank, biases, silu):
    linear = maps(width, rank, biases, silu)
    x, into = torch.randn(1, 50, width), torch.randn(1, 50, width)
    index = torch.randperm(50)[:count].sort().values
    expected = into.clone()
    PLAIN.forecast(linear, x, into, expected, index)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RowOps, "forecast", refuse)
        CompiledRowOps().forecast(linear, x, into, into, index)
    same(into, expected, 1e-4)


def maps(width, rank, biases=True, silu=False):
    return transposed(
        LinearUnit(
            torch.randn(width),
            torch.tensor(0.0),
            torch.randn(rank, width) / width**0.5,
            torch.randn(rank) if biases else None,
            torch.randn(width, rank) / rank**0.5,
            torch.randn(width) if biases else None,
            silu,
        )
    )


@pytest.mark.parametrize(("width", "rank"), [(20, 16), (16, 8), (16, 1024)])
def test_shapes_that_no_loop_covers(width, rank, ops):
    linear, x = maps(width, rank), torch.randn(1, 9, width)
    found, expected = torch.zeros(1, 9, width), torch.zeros(1, 9, width)
    index = torch.arange(0, 9, 2)
    ops.forecast(linear, x, found, found, index)
    PLAIN.forecast(linear, x, expected, expected, index)
    same(found, expected)
    assert found.any()


def test_other_dtypes_layouts_and_gradients_take_the_pytorch_way(ops):
    module = LlamaRMSNorm(16)
    x = torch.randn(4, 16)
    same(ops.norm(module, x.bfloat16()), module(x.bfloat16()))
    same(ops.norm(module, x.t().contiguous().t()), module(x))
    same(ops.norm(nn.LayerNorm(16), x), nn.LayerNorm(16)(x))
    with torch.enable_grad():
        y = x.clone().requires_grad_()
        ops.norm(module, y).sum().backward()
        assert y.grad is not None
    wide = torch.randn(8, 8)
    same(ops.silu_mul(wide.t().clone().t(), wide), PLAIN.silu_mul(wide.clone(), wide))


@pytest.mark.parametrize("number", [-1, 6, 2**40])
@pytest.mark.parametrize("name", ["add", "forecast", "mlp", "add_mlp", "rotate", "attend"])
def test_a_row_number_outside_of_its_buffer_is_an_error_and_nothing_is_written(name, number, ops):
    """Eight row numbers, the last of them wrong, as those of a longer batch would be."""
    stream, residual = torch.randn(1, 6, 16), torch.randn(1, 6, 16)
    index = torch.tensor([0, 1, 2, 3, 4, 5, 5, number])
    weights, angle = swiglu_weights(16, 20), torch.randn(6, 16)
    angles, heads = Angles(angle.cos(), angle.sin(), index), torch.randn(8, 2, 16)
    keys = torch.randn(2, 6, 16)
    run = {
        "add": lambda: ops.add(residual, stream, index, torch.randn(8, 16)),
        "forecast": lambda: ops.forecast(maps(16, 16), residual, residual, stream, index),
        "mlp": lambda: ops.mlp(weights, residual[0], index),
        "add_mlp": lambda: ops.add_mlp(weights, residual, residual, stream, index),
        "rotate": lambda: ops.rotate(heads, angles),
        "attend": lambda: ops.attend(heads, keys, keys, index, 0.3),
    }[name]
    before = stream.clone()
    with pytest.raises(IndexError, match="outside"):
        run()
    assert torch.equal(stream, before)


def test_tensors_of_two_forwards_are_an_error(ops):
    """Masks, streams and residuals of another length than the row numbers were made for."""
    short, long, index = torch.randn(1, 6, 16), torch.randn(1, 9, 16), torch.arange(6)
    mask = torch.ones(1, 6, dtype=torch.bool)
    for run in (
        lambda: ops.split(mask, mask[:, :5]),
        lambda: ops.add(short, long, index, torch.randn(6, 16)),
        lambda: ops.add(short, short, index[:3], torch.randn(6, 16)),
        lambda: ops.forecast(maps(16, 16), short, long, long, index),
        lambda: ops.add_mlp(swiglu_weights(16, 20), long, short, short, index),
        lambda: ops.silu_mul(short, long),
    ):
        with pytest.raises(IndexError, match="fit"):
            run()


@pytest.mark.parametrize("policy", ["keep", "evict"])
@pytest.mark.parametrize("kernels", ["compiled", "torch"])
def test_a_routed_model_equals_the_masked_one(kernels, policy):
    model, ids = small_model(), small_ids(3, 40)
    sites = all_sites(model, "unit")
    tables = random_tables(sites, rows=3, positions=40, execute=0.5)
    method = Scripted(tables, random_maps(sites, 32), kv_policy=policy)
    with routed(model, method, "masked"):
        expected = model(input_ids=ids).logits
    with routed(model, method, "gathered", kernels=kernels):
        assert routing_of(model).ops.compiled == (kernels == "compiled")
        same(model(input_ids=ids).logits, expected, 2e-4)
