"""The PyTorch references against the modules and functions that they stand for."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from methods.base import LinearUnit, SwiGLU
from methods.engine.ops.triton.attend_rows import attend
from methods.engine.ops.triton.linear_rows import linear_rows, linear_rows_add, swiglu_rows
from methods.engine.ops.triton.route import partition, route_and_forecast
from methods.engine.ops.triton.types import Sight
from methods.parts.forecaster import Forecaster
from tests.methods.engine.ops.triton.launches import first


@settings(max_examples=50, deadline=None, derandomize=True)
@given(batch=st.integers(1, 4), tokens=st.integers(1, 9), data=st.data())
def test_partition(batch, tokens, data):
    flags = st.lists(st.booleans(), min_size=batch * tokens, max_size=batch * tokens)
    execute, valid = data.draw(flags), data.draw(flags)
    kinds = [0 if e and v else 1 if v else 2 for e, v in zip(execute, valid, strict=True)]
    found = partition(
        torch.tensor(execute).view(batch, tokens), torch.tensor(valid).view(batch, tokens)
    )
    expected = [i for kind in range(3) for i, k in enumerate(kinds) if k == kind]
    assert found.index_N.tolist() == expected
    assert (int(found.executed), int(found.bypassed)) == (kinds.count(0), kinds.count(1))
    per_sequence = [kinds[b * tokens : (b + 1) * tokens].count(0) for b in range(batch)]
    assert found.counts_B.tolist() == per_sequence
    assert found.starts_B.tolist() == [sum(per_sequence[:b]) for b in range(batch)]


@pytest.mark.parametrize("count", [0, 3, 7])
def test_rows(count):
    x, residual, index = torch.randn(7, 8), torch.randn(7, 8), torch.randperm(7)
    gate, up = torch.nn.Linear(8, 12), torch.nn.Linear(8, 12)
    down, chosen = torch.nn.Linear(12, 8), index[:count]
    rows = first(index, torch.tensor(count))
    with torch.no_grad():
        compact = linear_rows(x, rows, gate.weight, gate.bias)
        assert torch.allclose(compact[:count], gate(x[chosen]), atol=1e-6)
        after = residual.clone()
        compact[count:] = float("nan")
        linear_rows_add(compact, after, rows, down.weight, down.bias)
        expected = residual.clone()
        expected[chosen] += down(gate(x[chosen]))
        assert torch.allclose(after, expected, atol=1e-5)
        after = residual.clone()
        swiglu_rows(x, after, rows, SwiGLU(gate.weight, up.weight, down.weight))
        expected = residual.clone()
        some = x[chosen]
        middle = functional.silu(some @ gate.weight.T) * (some @ up.weight.T)
        expected[chosen] += middle @ down.weight.T
        assert torch.allclose(after, expected, atol=1e-5)


@pytest.mark.parametrize("activation", ["silu", "identity"])
@pytest.mark.parametrize("threshold", [-math.inf, 0.0, math.inf])
def test_route(activation, threshold):
    forecaster = Forecaster(width=8, rank=3, activation=activation).requires_grad_(False)
    for parameter in forecaster.parameters():
        parameter.normal_()
    x, before, weight = torch.randn(10, 8), torch.randn(10, 8), torch.randn(8)
    valid = torch.arange(10) % 5 > 0
    after = before.clone()
    linear = LinearUnit(
        weight,
        torch.tensor(0.3),
        forecaster.down.weight,
        forecaster.down.bias,
        forecaster.up.weight,
        forecaster.up.bias,
        activation == "silu",
    )
    routed = route_and_forecast(x, after, valid, linear, torch.tensor(threshold), tokens=5)
    scores = x @ weight + 0.3
    assert torch.allclose(routed.scores_N, scores, atol=1e-6)
    assert torch.equal(routed.execute_N, (scores > threshold) & valid)
    for row in range(10):
        bypassed = bool(valid[row] and not routed.execute_N[row])
        expected = before[row] + (forecaster(x[row]) if bypassed else 0)
        assert torch.allclose(after[row], expected, atol=1e-5)


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("past", [0, 5])
def test_attend_equals_rows_of_the_causal_kernel(heads, past):
    batch, tokens, width = 2, 6, 8
    slots = past + tokens
    query = torch.randn(batch, heads[0], tokens, width)
    key, value = (torch.randn(batch, heads[1], slots, width) for _ in range(2))
    pads = torch.tensor([0, 2])
    seen = torch.arange(slots) <= past + torch.arange(tokens)[:, None]
    seen = seen & (torch.arange(slots) >= pads[:, None, None])
    execute = (torch.rand(batch, tokens) < 0.6) & seen.any(-1)
    dense = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=seen[:, None], scale=0.4, enable_gqa=True
    )
    rows = partition(execute, torch.ones_like(execute))
    flat = query.transpose(1, 2).flatten(0, 1)[rows.index_N]
    sight = Sight(tokens, past, first_valid_B=pads)
    found = attend(flat, rows, key, value, sight, scale=0.4)
    expected = dense.transpose(1, 2).flatten(0, 1)[rows.index_N]
    count = int(rows.executed)
    assert count and torch.allclose(found[:count], expected[:count], atol=1e-5)


def test_attend_over_a_compact_cache_is_causal_among_the_kept():
    """Evicting what is bypassed and attending to the rest, by construction of that cache."""
    tokens, kept_before = 6, 3
    execute = torch.tensor([[True, False, True, True, False, True]])
    rows = partition(execute, torch.ones_like(execute))
    key, value = torch.randn(1, 1, 10, 8), torch.randn(1, 1, 10, 8)
    query = torch.randn(6, 1, 8)
    sight = Sight(tokens, torch.tensor([kept_before]), compact=True)
    found = attend(query, rows, key, value, sight, scale=1.0)
    for i in range(4):
        keys, values = key[0, 0, : kept_before + i + 1], value[0, 0, : kept_before + i + 1]
        expected = (query[i, 0] @ keys.T).softmax(-1) @ values
        assert torch.allclose(found[i, 0], expected, atol=1e-5)
    with pytest.raises(ValueError, match="first_N"):
        attend(query, rows, key, value, sight._replace(window=4), scale=1.0)
    with pytest.raises(ValueError, match="heads"):
        cache = torch.randn(1, 2, 9, 8)
        attend(torch.randn(6, 3, 8), rows, cache, cache, Sight(6, 3), scale=1.0)
