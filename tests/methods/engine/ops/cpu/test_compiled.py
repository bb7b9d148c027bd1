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
from methods.engine.ops.cpu.tiled import TiledRowOps
from methods.engine.ops.rotary import Angles
from methods.engine.ops.row_ops import RowOps
from methods.engine.routed import routed
from methods.engine.routing import routing_of
from tests.methods.conftest import small_ids, small_model
from tests.methods.engine.scripted import Scripted, all_sites, random_maps, random_tables

pytestmark = pytest.mark.skipif(reason_without() is not None, reason="no C compiler")

PLAIN = RowOps()
TILES = pytest.mark.skipif(reason_without(torch.bfloat16) is not None, reason="no AMX")
LOOPS = [CompiledRowOps, pytest.param(TiledRowOps, marks=TILES)]
FLOATS = [torch.float32, pytest.param(torch.bfloat16, marks=TILES)]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(params=LOOPS)
def ops(request):
    return request.param()


def refuse(*_, **__):
    raise AssertionError("the PyTorch operation ran")


@pytest.fixture
def alone(monkeypatch, ops):
    """The operations, without the PyTorch ones to fall back to."""
    names = ("norm", "normed_scores", "scores", "silu_mul", "mlp", "add_mlp", "rotate", "split")
    for name in (*names, "add", "forecast"):
        monkeypatch.setattr(RowOps, name, refuse)
    return ops


def same(found, expected, tolerance=1e-5):
    """To a tolerance, or to two units in the last place of bfloat16."""
    if found.dtype == torch.bfloat16:
        found, expected, tolerance = found.float(), expected.float(), max(tolerance, 2**-7)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def draw(ops, *shape):
    return torch.randn(shape).to(ops.dtype)


def norm_of(ops, width):
    module = LlamaRMSNorm(width, eps=1e-5)
    module.weight.data = torch.randn(width)
    return module.to(ops.dtype)


@pytest.mark.parametrize("rows", [1, 7, 100])
@pytest.mark.parametrize("width", [1, 15, 576])
def test_norm(rows, width, alone):
    module, x = norm_of(alone, width), 10 * draw(alone, 2, rows, width)
    same(alone.norm(module, x), module(x))


@pytest.mark.parametrize("width", [1, 15, 576])
def test_scores_with_the_norm(width, alone):
    module, x = norm_of(alone, width), draw(alone, 2, 7, width)
    score, offset = torch.randn(width), torch.tensor(0.7)
    normed, scores = alone.normed_scores(module, x, score, offset)
    same(normed, module(x))
    assert scores.dtype == torch.float32
    same(scores, (normed.double() @ score.double() + 0.7).float(), 1e-4)


def test_silu_mul_over_the_whole_range(alone):
    ends = torch.tensor([0.0, -0.0, 3e38, -3e38])
    gate = torch.cat([torch.linspace(-100, 100, 4001), ends]).to(alone.dtype)
    up = draw(alone, len(gate))
    # of the double: at -3e38 float32 has no answer to compare with
    expected = (torch.nn.functional.silu(gate.double()) * up).to(alone.dtype)
    found = alone.silu_mul(gate.clone(), up)
    same(found[:-1], expected[:-1])
    assert found.isfinite().all()
    one = torch.ones(2, dtype=alone.dtype)
    broken = alone.silu_mul(one * torch.tensor([float("nan"), 1.0]).to(alone.dtype), one)
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
    check_mlp(CompiledRowOps(), count, width, neurons, gathered)


@TILES
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    count=st.sampled_from([1, 15, 16, 17, 32, 33, 150, 511, 512, 530, 1100]),
    width=st.sampled_from([32, 64, 576]),
    neurons=st.sampled_from([32, 96, 1536]),
    gathered=st.booleans(),
    seed=st.integers(0, 99),
)
def test_mlp_in_tiles(count, width, neurons, gathered, seed):
    """Short panels, panels without a second, and more than a chunk of rows."""
    torch.manual_seed(seed)
    check_mlp(TiledRowOps(), count, width, neurons, gathered)


def check_mlp(ops, count, width, neurons, gathered):
    weights, held = swiglu_weights(ops, width, neurons), count + 50 * gathered
    x = draw(ops, held, width)
    index = torch.randperm(held)[:count].sort().values if gathered else None
    expected = mlp_in_double(weights, x if index is None else x[index])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RowOps, "mlp", refuse)
        same(ops.mlp(weights, x, index), expected, 1e-5 if ops.dtype == torch.float32 else 2**-6)


def swiglu_weights(ops, width, neurons):
    shapes = ((neurons, width), (neurons, width), (width, neurons))
    return SwiGLU(*(draw(ops, *shape) / shape[1] ** 0.5 for shape in shapes))


def mlp_in_double(weights, x):
    gate, up, down = (weight.double() for weight in weights)
    hidden = torch.nn.functional.silu(x.double() @ gate.t()) * (x.double() @ up.t())
    return (hidden @ down.t()).float()


@pytest.mark.parametrize("in_place", [False, True])
def test_add_mlp(in_place, alone):
    weights, x = swiglu_weights(alone, 64, 96), draw(alone, 2, 30, 64)
    residual, index = draw(alone, 2, 30, 64), torch.arange(0, 60, 3)
    expected = residual.flatten(0, 1).float().clone()
    expected[index] += mlp_in_double(weights, x.flatten(0, 1)[index])
    into = residual if in_place else residual.clone()
    alone.add_mlp(weights, x, residual, into, index)
    same(into.flatten(0, 1), expected)


def test_an_mlp_of_many_rows_is_the_librarys(monkeypatch):
    monkeypatch.setattr(compiled, "MOST_PACKED", 20 * 8)
    ops = CompiledRowOps()
    weights, x = swiglu_weights(ops, 8, 24), torch.randn(21, 8)
    same(ops.mlp(weights, x), mlp_in_double(weights, x))
    monkeypatch.setattr(RowOps, "mlp", refuse)
    ops.mlp(weights, x[:20])
    with pytest.raises(AssertionError, match="PyTorch"):
        ops.mlp(weights, x)


@pytest.mark.parametrize(("batch", "shared"), [(1, True), (3, True), (3, False)])
@pytest.mark.parametrize("gathered", [False, True])
def test_rotate(batch, shared, gathered, ops):
    tokens, heads, size = 11, 3, 8
    angle = draw(ops, 1 if shared else batch, tokens, size).flatten(0, 1)
    angles = Angles(angle.cos(), angle.sin())
    x = draw(ops, batch, tokens, heads, size)
    if gathered:
        index = torch.randperm(batch * tokens)[:9].sort().values
        x, angles = x.flatten(0, 1)[index], angles.at(index)
    assert not torch.equal(ops.rotate(x, angles), x)
    same(ops.rotate(x, angles), PLAIN.rotate(x, angles), 2e-2 if ops.dtype.itemsize == 2 else 1e-5)
    room = x.new_zeros(*x.shape[:-3], heads, x.shape[-3] + 4, size)
    slots = room.narrow(-2, 3, x.shape[-3]).transpose(-3, -2)
    for run in (ops, PLAIN):
        assert torch.equal(run.rotate(x, angles, out=slots), run.rotate(x, angles))
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
    into, index = draw(alone, 2, 30, 5), torch.arange(0, 60, 3)
    delta = draw(alone, len(index), 5)
    expected = into.flatten(0, 1).index_add(0, index, delta).view_as(into)
    out = torch.full_like(into, float("nan"))
    alone.add(into, out, index, delta)
    written = out.flatten(0, 1)
    same(written[index], expected.flatten(0, 1)[index])
    assert written.isnan().any(1).sum() == 60 - len(index)
    alone.add(into, into, index, delta)
    same(into, expected)


def test_output_buffer(ops):
    residual = draw(ops, 2, 3, 4)
    assert torch.equal(ops.output_buffer(residual, filled=False), residual)
    for filled in (False, True):
        made = ops.output_buffer(residual, filled=filled)
        assert made.shape == residual.shape and made.data_ptr() != residual.data_ptr()


@pytest.mark.parametrize("loops", LOOPS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    keys=st.sampled_from([8, 63, 64, 65, 300, 700]),
    queries=st.integers(8, 60),
    heads=st.sampled_from([(1, 1), (3, 1), (9, 3), (4, 4)]),
    size=st.sampled_from([16, 64, 80, 256]),
    layout=st.sampled_from(["cache", "projection"]),
    seed=st.integers(0, 99),
)
def test_attend(loops, keys, queries, heads, size, layout, seed):
    """Any rising bounds, two queries at one key included, at scores of every size."""
    size = size - size % loops.lanes or loops.lanes
    generator = torch.Generator().manual_seed(seed)

    def made(*shape):
        return (3 * torch.randn(*shape, generator=generator)).to(loops.dtype)

    number, shared = heads
    last = torch.randint(0, keys, (queries,), generator=generator).sort().values
    query = made(queries, number, size)
    if layout == "cache":
        key, value = (made(shared, keys + 9, size)[:, :keys] for _ in range(2))
    else:
        key, value = (made(keys, shared, size).transpose(0, 1) for _ in range(2))
    found = loops().attend(query, key, value, last, 0.2)
    groups = query.double().view(queries, shared, -1, size)
    scores = torch.einsum("nkgd,ksd->nkgs", groups, key.double()) * 0.2
    scores = scores.masked_fill(torch.arange(keys) > last[:, None, None, None], float("-inf"))
    expected = torch.einsum("nkgs,ksd->nkgd", scores.softmax(-1), value.double())
    assert found is not None
    # weights are rounded: of values around 3, by a few units in the last place of a weight
    tolerance = 2e-4 if loops is CompiledRowOps else 3e-2
    same(found, expected.reshape(queries, number, size).float(), tolerance)


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


def test_attend_one_under_a_mask_takes_the_pytorch_way():
    ops = CompiledRowOps()
    query, key, seen = torch.randn(2, 16), torch.randn(2, 5, 16), [True, False, True, True, False]
    mask = torch.tensor(seen).view(1, 1, 1, 5)
    found = ops.attend_one(query, key, key, mask, 0.3)
    same(found, ops.attend_one(query, key[:, seen], key[:, seen], None, 0.3))


def test_attention_that_no_loop_covers(ops):
    def asked(queries=9, size=32, dtype=ops.dtype):
        query, key = (torch.randn(n, m, size).to(dtype) for n, m in ((queries, 2), (2, 20)))
        return ops.attend(query, key, key, torch.arange(queries), 1.0)

    assert asked() is not None
    assert asked(queries=1) is None and asked(size=24) is None and asked(size=288) is None
    assert asked(dtype=torch.float16) is None


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    count=st.integers(0, 40),
    width=st.sampled_from([16, 80, 576]),
    rank=st.sampled_from([16, 64, 96, 512]),
    biases=st.booleans(),
    silu=st.booleans(),
)
def test_forecast(count, width, rank, biases, silu):
    check_forecast(CompiledRowOps(), count, width, rank, biases, silu)


@TILES
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    count=st.integers(0, 50),
    width=st.sampled_from([32, 96, 576, 1056]),
    rank=st.sampled_from([32, 64, 512]),
    biases=st.booleans(),
    silu=st.booleans(),
)
def test_forecast_in_tiles(count, width, rank, biases, silu):
    """Widths that are packed at once and in parts."""
    check_forecast(TiledRowOps(), count, width, rank, biases, silu)


def check_forecast(ops, count, width, rank, biases, silu):
    torch.manual_seed(count)
    linear = maps(width, rank, biases, silu)
    x, into = draw(ops, 1, 50, width), draw(ops, 1, 50, width)
    index = torch.randperm(50)[:count].sort().values
    expected = into.double()
    expected[0, index] += estimate_in_double(linear, x[0, index])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RowOps, "forecast", refuse)
        ops.forecast(ops.maps(linear), x, into, into, index)
    # in bfloat16 the hidden numbers are rounded too
    same(into, expected.float(), 1e-4 if ops.dtype == torch.float32 else 2**-6)


def estimate_in_double(linear, x):
    down, up = (map_.to(x.dtype).double() for map_ in (linear.down_rD, linear.up_Dr))
    hidden = x.double() @ down.t() + (0.0 if linear.down_bias_r is None else linear.down_bias_r)
    hidden = torch.nn.functional.silu(hidden) if linear.silu else hidden
    return hidden @ up.t() + (0.0 if linear.bias_D is None else linear.bias_D)


def maps(width, rank, biases=True, silu=False):
    return LinearUnit(
        torch.randn(width),
        torch.tensor(0.0),
        torch.randn(rank, width) / width**0.5,
        torch.randn(rank) if biases else None,
        torch.randn(width, rank) / rank**0.5,
        torch.randn(width) if biases else None,
        silu,
    )


@pytest.mark.parametrize("rows", [1, 16, 40, 1030])
@pytest.mark.parametrize(("inputs", "outputs"), [(32, 64), (576, 192)])
@pytest.mark.parametrize("number", [1, 2])
@TILES
def test_linears(number, inputs, outputs, rows, monkeypatch):
    monkeypatch.setattr(RowOps, "linears", refuse)
    ops = TiledRowOps()
    modules = [nn.Linear(inputs, outputs, bias=False).bfloat16() for _ in range(number)]
    x = draw(ops, 1, rows, inputs)
    for found, module in zip(ops.linears(modules, x), modules, strict=True):
        same(found, (x.double() @ module.weight.double().t()).float())


def test_projections_that_no_loop_covers(ops):
    for sizes in ([(32, 64)], [(20, 64)], [(32, 24)], [(32, 32), (32, 64)], [(32, 32)] * 3):
        modules = [nn.Linear(*size, bias=size == (32, 64)).to(ops.dtype) for size in sizes]
        x = draw(ops, 5, sizes[0][0])
        for found, module in zip(ops.linears(modules, x), modules, strict=True):
            assert torch.equal(found, module(x))


@pytest.mark.parametrize(("width", "rank"), [(20, 16), (16, 8), (16, 1024)])
def test_shapes_that_no_loop_covers(width, rank, ops):
    linear, x = ops.maps(maps(width, rank)), draw(ops, 1, 9, width)
    found, expected = torch.zeros_like(x), torch.zeros_like(x)
    index = torch.arange(0, 9, 2)
    ops.forecast(linear, x, found, found, index)
    PLAIN.forecast(linear, x, expected, expected, index)
    same(found, expected)
    assert found.any()


def test_other_dtypes_layouts_and_gradients_take_the_pytorch_way(ops):
    module = LlamaRMSNorm(16).to(ops.dtype)
    x = draw(ops, 4, 16)
    same(ops.norm(module, x.half()), module(x.half()))
    same(ops.norm(module, x.t().contiguous().t()), module(x))
    other = nn.LayerNorm(16).to(ops.dtype)
    same(ops.norm(other, x), other(x))
    with torch.enable_grad():
        y = x.clone().requires_grad_()
        ops.norm(module, y).sum().backward()
        assert y.grad is not None
    wide = draw(ops, 8, 8)
    same(ops.silu_mul(wide.t().clone().t(), wide), PLAIN.silu_mul(wide.clone(), wide))


@pytest.mark.parametrize("number", [-1, 6, 2**40])
@pytest.mark.parametrize("name", ["add", "forecast", "mlp", "add_mlp", "rotate", "attend"])
def test_a_row_number_outside_of_its_buffer_is_an_error_and_nothing_is_written(name, number, ops):
    """Eight row numbers, the last of them wrong, as those of a longer batch would be."""
    stream, residual = draw(ops, 1, 6, 32), draw(ops, 1, 6, 32)
    index = torch.tensor([0, 1, 2, 3, 4, 5, 5, number])
    weights, angle = swiglu_weights(ops, 32, 64), draw(ops, 6, 32)
    angles, heads = Angles(angle.cos(), angle.sin(), index), draw(ops, 8, 2, 32)
    keys, linear = draw(ops, 2, 6, 32), ops.maps(maps(32, 32))
    run = {
        "add": lambda: ops.add(residual, stream, index, draw(ops, 8, 32)),
        "forecast": lambda: ops.forecast(linear, residual, residual, stream, index),
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
    short, long, index = draw(ops, 1, 6, 32), draw(ops, 1, 9, 32), torch.arange(6)
    weights, linear = swiglu_weights(ops, 32, 64), ops.maps(maps(32, 32))
    mask = torch.ones(1, 6, dtype=torch.bool)
    for run in (
        lambda: ops.split(mask, mask[:, :5]),
        lambda: ops.add(short, long, index, draw(ops, 6, 32)),
        lambda: ops.add(short, short, index[:3], draw(ops, 6, 32)),
        lambda: ops.forecast(linear, short, long, long, index),
        lambda: ops.add_mlp(weights, long, short, short, index),
        lambda: ops.silu_mul(short, long),
    ):
        with pytest.raises(IndexError, match="fit"):
            run()


@pytest.mark.parametrize("policy", ["keep", "evict"])
@pytest.mark.parametrize("kernels", ["compiled", "torch"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_routed_model_equals_the_masked_one(dtype, kernels, policy):
    """At sizes that tiles cover, in one pass and decoding; in bfloat16, no further from float32
    than the masked one."""
    sizes = {"head_dim": 32, "intermediate_size": 64}
    model, ids = small_model(width=64, **sizes), small_ids(3, 40)
    sites = all_sites(model, "unit")
    tables = random_tables(sites, rows=3, positions=40, execute=0.5)
    method = Scripted(tables, random_maps(sites, 64), kv_policy=policy)
    with routed(model, method, "masked"):
        expected = model(input_ids=ids).logits
    model = model.to(dtype)
    method.maps = {site: map_.to(dtype) for site, map_ in method.maps.items()}
    with routed(model, method, "masked"):
        rounding = (model(input_ids=ids).logits - expected).abs().max()
    with routed(model, method, "gathered", kernels=kernels):
        assert routing_of(model).ops.compiled == (kernels == "compiled")
        whole = model(input_ids=ids)
        first = model(input_ids=ids[:, :30])
        rest = [
            model(input_ids=ids[:, t : t + 1], past_key_values=first.past_key_values).logits
            for t in range(30, 40)
        ]
    bound = max(2e-4, 1.5 * float(rounding))
    for found in (whole.logits, torch.cat([first.logits, *rest], 1)):
        assert (found - expected).abs().max() <= bound
