"""Linear layers and the MLP of gathered rows against PyTorch on the same rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from methods.base import SwiGLU
from methods.engine.ops.triton.linear_rows import linear_rows, linear_rows_add, swiglu_rows
from tests.methods.engine.ops.triton.interpreted.conftest import close, draw
from tests.methods.engine.ops.triton.launches import first

HALF = [torch.bfloat16, torch.float16]


def problem(rows, count, inputs, outputs, seed, dtype, device):
    """x, the first rows of a shuffled index, and a weight of sensible size."""
    x = draw(rows, inputs, seed=seed, dtype=dtype, device=device)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).to(device)
    weight = draw(outputs, inputs, seed=seed + 1, device=device) / inputs**0.5
    return x, first(order, torch.tensor(count, device=device)), weight.to(dtype)


def check_linear(rows, count, inputs, outputs, bias, seed, dtype, device):
    x, order, weight = problem(rows, count, inputs, outputs, seed, dtype, device)
    index = order.index_N
    bias = draw(outputs, seed=seed + 2, dtype=dtype, device=device) if bias else None
    chosen = index[:count]
    delta = torch.nn.functional.linear(x[chosen].float(), weight.float(), None)
    delta = delta if bias is None else delta + bias.float()
    compact = linear_rows(x, order, weight, bias, kernels="triton")
    assert close(compact[:count], delta.to(dtype))

    source = x[index].clone()
    source[count:] = float("nan")
    residual = draw(rows, outputs, seed=seed + 3, dtype=dtype, device=device)
    expected = residual.clone()
    expected[chosen] = (expected[chosen].float() + delta).to(dtype)
    linear_rows_add(source, residual, order, weight, bias, kernels="triton")
    assert close(residual, expected)
    untouched = index[count:]
    assert torch.equal(residual[untouched], expected[untouched])


def check_mlp(rows, count, width, inner, bias, seed, dtype, device):
    x, order, gate = problem(rows, count, width, inner, seed, dtype, device)
    index = order.index_N
    up = (draw(inner, width, seed=seed + 4, device=device) / width**0.5).to(dtype)
    down = (draw(width, inner, seed=seed + 5, device=device) / inner**0.5).to(dtype)
    biases = [
        draw(size, seed=seed + 6, dtype=dtype, device=device) if bias else None
        for size in (inner, inner, width)
    ]
    residual = draw(rows, width, seed=seed + 7, dtype=dtype, device=device)
    expected, chosen = residual.clone(), index[:count]
    exact = [None if b is None else b.float() for b in biases]
    linear, some = torch.nn.functional.linear, x[chosen].float()
    middle = torch.nn.functional.silu(linear(some, gate.float(), exact[0]))
    middle = middle * linear(some, up.float(), exact[1])
    delta = linear(middle, down.float(), exact[2])
    expected[chosen] = (expected[chosen].float() + delta).to(dtype)
    swiglu_rows(x, residual, order, SwiGLU(gate, up, down), biases, kernels="triton")
    assert close(residual, expected)
    assert torch.equal(residual[index[count:]], expected[index[count:]])


sizes = {
    "rows": st.integers(1, 40),
    "width": st.sampled_from([16, 24, 32, 40]),
    "inner": st.sampled_from([16, 20, 48, 56]),
    "bias": st.booleans(),
    "seed": st.integers(0, 99),
    "share": st.floats(0, 1),
}


@pytest.mark.parametrize("check", [check_linear, check_mlp])
def test_any_share_of_the_rows(check, small_tiles, device):
    @settings(max_examples=8, deadline=None, derandomize=True)
    @given(**sizes)
    def run(rows, width, inner, bias, seed, share):
        check(rows, round(share * rows), width, inner, bias, seed, torch.float32, device)

    run()


@pytest.mark.parametrize("check", [check_linear, check_mlp])
@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 32, 33])
def test_counts_at_the_edges_of_tiles(check, count, small_tiles, device):
    check(33, count, 32, 24, False, 5, torch.float32, device)


@pytest.mark.parametrize("check", [check_linear, check_mlp])
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision(check, dtype, small_tiles, device):
    check(24, 19, 40, 48, True, 3, dtype, device)


@pytest.mark.parametrize("check", [check_linear, check_mlp])
@pytest.mark.parametrize("rows", [1, 8, 40, 130])
def test_tiles_that_a_gpu_would_take(check, rows, device):
    check(rows, (rows + 1) // 2, 72, 80, False, 1, torch.float32, device)


def test_inside_torch_compile(small_tiles, device):
    x, order, gate = problem(20, 9, 16, 16, 0, torch.float32, device)
    weights = SwiGLU(gate, gate, gate)

    def layer(x, residual):
        swiglu_rows(x * 2, residual, order, weights, kernels="triton")
        return residual.sum(-1)

    expected = layer(x, x.clone())
    assert close(torch.compile(layer, backend="eager")(x, x.clone()), expected)


def test_no_rows(device):
    x, order, weight = problem(4, 0, 16, 16, 0, torch.float32, device)
    none = order._replace(index_N=order.index_N[:0])
    assert linear_rows(x[:0], none, weight, kernels="triton").shape == (0, 16)
    swiglu_rows(x[:0], x[:0], none, SwiGLU(weight, weight, weight), kernels="triton")


def test_refuses_a_transposed_weight(device):
    x, order, weight = problem(4, 2, 16, 16, 0, torch.float32, device)
    with pytest.raises(ValueError, match="contiguous"):
        linear_rows(x, order, weight.T, kernels="triton")
