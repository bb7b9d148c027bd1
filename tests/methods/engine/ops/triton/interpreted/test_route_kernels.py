"""Fused router, forecaster and partition against the modules of `methods.parts`."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from methods.base import LinearUnit
from methods.engine.ops.triton.route import (
    forecast_bypassed,
    partition_reference,
    route_and_forecast,
)
from methods.parts.forecaster import Forecaster
from methods.parts.routers import Router
from tests.methods.engine.ops.triton.interpreted.conftest import TOLERANCE, close, draw, masks


def modules(width, rank, activation, device):
    """A router and a forecaster whose outputs are of size one."""
    router = Router(width=width).to(device)
    forecaster = Forecaster(width=width, rank=rank, activation=activation).to(device)
    with torch.no_grad():
        for parameter in [*router.parameters(), *forecaster.parameters()]:
            parameter.copy_(draw(*parameter.shape, seed=parameter.numel(), device=device) / 4)
    return router.requires_grad_(False), forecaster.requires_grad_(False)


def unit(router, forecaster=None):
    """The contract's form of both."""
    score = (router.head.weight[0], router.head.bias[0])
    if forecaster is None:
        return LinearUnit(*score)
    down, up = forecaster.down, forecaster.up
    silu = isinstance(forecaster.activation, torch.nn.SiLU)
    return LinearUnit(*score, down.weight, down.bias, up.weight, up.bias, silu)


def check(
    batch,
    tokens,
    width,
    rank,
    activation,
    threshold,
    dtype,
    seed,
    device,
    forecast=True,
    reserve=0,
):
    router, forecaster = modules(width, rank, activation, device)
    _, valid = masks(batch, tokens, 1.0, seed, device)
    valid = valid.flatten()
    x = draw(batch * tokens, width, seed=seed, dtype=dtype, device=device)
    before = draw(batch * tokens, width, seed=seed + 1, dtype=dtype, device=device)
    after, score = before.clone(), router(x)
    reserved = (torch.arange(tokens, device=device) < reserve).repeat(batch)
    routed = route_and_forecast(
        x,
        after,
        valid,
        unit(router, forecaster if forecast else None),
        torch.tensor(threshold, device=device),
        tokens=tokens,
        reserved_N=reserved if reserve else None,
        kernels="triton",
    )
    assert torch.allclose(routed.scores_N, score, atol=2e-5)
    execute = ((routed.scores_N > threshold) | reserved) & valid
    assert torch.equal(routed.execute_N, execute)
    bypass = valid & ~execute
    expected = before.clone()
    if forecast:
        estimate = forecaster(x[bypass].float())
        expected[bypass] = (before[bypass].float() + estimate).to(dtype)
    assert close(after, expected)
    assert torch.equal(after[~bypass], before[~bypass])
    rows = partition_reference(execute.view(batch, tokens), valid.view(batch, tokens))
    assert all(torch.equal(a, b) for a, b in zip(routed.rows, rows, strict=True))


@settings(max_examples=9, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 4),
    tokens=st.integers(1, 24),
    width=st.sampled_from([12, 64, 80]),
    rank=st.sampled_from([1, 5, 12]),
    activation=st.sampled_from(["identity", "silu"]),
    threshold=st.sampled_from([-math.inf, -0.5, 0.0, 0.5, math.inf]),
    seed=st.integers(0, 99),
)
def test_prefill(device, batch, tokens, width, rank, activation, threshold, seed):
    check(batch, tokens, width, rank, activation, threshold, torch.float32, seed, device)


@pytest.mark.parametrize("batch", [1, 2, 17, 70])
def test_decode(batch, device):
    """One token a sequence; up to 64 of them are ordered by the deciding program itself."""
    check(batch, 1, 32, 4, "identity", 0.0, torch.float32, 2, device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["identity", "silu"])
def test_half_precision(dtype, activation, device):
    check(2, 20, 64, 8, activation, 0.0, dtype, 4, device)


def test_slices_of_a_wide_input(device):
    """Width 576 over four slices, the last of them shorter."""
    check(1, 9, 576, 20, "silu", 0.0, torch.float32, 7, device)


@pytest.mark.parametrize("tokens, threshold", [(1, 0.0), (9, 0.0), (9, math.inf)])
def test_reserved_tokens_are_executed(tokens, threshold, device):
    check(3, tokens, 32, 4, "silu", threshold, torch.float32, 7, device, reserve=2)


def test_no_forecast(device):
    check(2, 9, 32, 4, "identity", 0.0, torch.float32, 7, device, forecast=False)


def test_threshold_and_offset_on_the_device(device):
    router, _ = modules(32, 4, "silu", device)
    x = draw(8, 32, seed=1, device=device)
    valid = torch.ones(8, dtype=torch.bool, device=device)
    threshold = router(x).median()
    linear = unit(router)
    routed = route_and_forecast(x, x.clone(), valid, linear, threshold, tokens=4, kernels="triton")
    assert 3 <= int(routed.rows.executed) <= 5


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_decisions_made_elsewhere(share, device):
    router, forecaster = modules(32, 4, "silu", device)
    execute, valid = (mask.flatten() for mask in masks(3, 7, share, 1, device))
    x, before = draw(21, 32, seed=1, device=device), draw(21, 32, seed=2, device=device)
    linear = unit(router, forecaster)
    after, bypass = before.clone(), valid & ~execute
    rows = forecast_bypassed(x, after, valid, execute, linear, tokens=7, kernels="triton")
    expected = before + forecaster(x) * bypass[:, None]
    assert torch.allclose(after, expected, atol=TOLERANCE[torch.float32])
    assert torch.equal(after[~bypass], before[~bypass])
    assert int(rows.bypassed) == int(bypass.sum())
