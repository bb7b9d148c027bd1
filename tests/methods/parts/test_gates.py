"""Hard gates: values, gradients and the frequencies of their samples."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from methods.options import Training
from methods.parts.gates import gumbel_gate, sigmoid_gate, straight_through
from methods.parts.penalties import sparsity_penalty

SCORES = torch.tensor([-3.0, -0.7, -0.01, 0.0, 0.01, 0.4, 2.5], dtype=torch.float64)


def numeric_slope(function, x, step=1e-5):
    return (function(x + step) - function(x - step)) / (2 * step)


def slope(gate, x):
    """Gradient of the sum of `gate` at x."""
    x = x.clone().requires_grad_()
    gate(x).sum().backward()
    return x.grad


def test_straight_through_is_hard_forward_and_soft_backward():
    soft = torch.rand(1000, requires_grad=True)
    hard = torch.rand(1000) > 0.5
    gate = straight_through(soft, hard)
    assert torch.equal(gate, hard.float())
    weights = torch.randn(1000)
    (gate * weights).sum().backward()
    assert torch.equal(soft.grad, weights)


@pytest.mark.parametrize("tau", [0.5, 1.0, 5.0])
def test_sigmoid_gate(tau):
    assert torch.equal(sigmoid_gate(SCORES, tau=tau), (SCORES > 0).double())
    expected = numeric_slope(lambda x: 1 / (1 + torch.exp(-x / tau)), SCORES)
    assert torch.allclose(slope(lambda x: sigmoid_gate(x, tau=tau), SCORES), expected, atol=1e-8)


@pytest.mark.parametrize("tau", [0.5, 5.0])
@pytest.mark.parametrize("score", [-2.0, -0.5, 0.0, 1.0, 3.0])
def test_gumbel_frequencies_are_the_softmax_of_the_pair(score, tau):
    draws = 40_000
    gate = gumbel_gate(torch.full((draws,), score), tau=tau)
    assert set(gate.unique().tolist()) <= {0.0, 1.0}
    expected = float(torch.softmax(torch.tensor([score, 0.0]), 0)[0])
    deviation = math.sqrt(expected * (1 - expected) / draws)
    assert float(gate.mean()) == pytest.approx(expected, abs=4.5 * deviation)


@pytest.mark.parametrize("tau", [0.7, 5.0])
def test_gumbel_gradient_is_that_of_the_soft_sample(tau):
    """The soft sample: softmax at temperature tau of (score + G1, G2), with G1 - G2 logistic."""
    torch.manual_seed(3)
    uniform = torch.rand_like(SCORES)
    noise = uniform.log() - (1 - uniform).log()

    def soft(x):
        return torch.softmax(torch.stack([x + noise, torch.zeros_like(x)]) / tau, 0)[0]

    torch.manual_seed(3)
    found = slope(lambda x: gumbel_gate(x, tau=tau), SCORES)
    assert torch.allclose(found, numeric_slope(soft, SCORES), atol=1e-6)


def test_gumbel_samples_differ_and_repeat_with_the_seed():
    scores = torch.zeros(200)
    torch.manual_seed(1)
    first, second = gumbel_gate(scores, tau=1.0), gumbel_gate(scores, tau=1.0)
    torch.manual_seed(1)
    assert not torch.equal(first, second)
    assert torch.equal(gumbel_gate(scores, tau=1.0), first)


@given(
    start=st.floats(-10, 10),
    end=st.floats(-10, 10),
    progress=st.floats(0, 1),
    beyond=st.floats(0, 5),
)
def test_the_temperature_is_a_straight_line_between_its_endpoints(start, end, progress, beyond):
    tau = Training(tau_start=start, tau_end=end).tau
    assert tau(0.0) == start
    assert tau(1.0) == pytest.approx(end)
    mixed = (1 - progress) * start + progress * end
    assert tau(progress) == pytest.approx(mixed, abs=1e-9)
    assert tau(-beyond) == start
    assert tau(1 + beyond) == pytest.approx(end)


@pytest.mark.parametrize(("rate", "value", "sign"), [(0.9, 1.6, 1), (0.7, 0.0, 0), (0.6, 0.8, -1)])
def test_sparsity_penalty(rate, value, sign):
    """Sparsity 0.3 asks for an execute rate of 0.7; weight 8 as published."""
    execute_rate = torch.tensor(rate, dtype=torch.float64, requires_grad=True)
    penalty = sparsity_penalty(execute_rate, 0.3, weight=8.0)
    assert float(penalty) == pytest.approx(value, abs=1e-12)
    penalty.backward()
    if sign:
        assert float(execute_rate.grad) == pytest.approx(8.0 * sign)
