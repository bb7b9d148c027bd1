"""Streamed least squares against solvers that see all the data."""

from __future__ import annotations

import numpy
import pytest
import torch

from methods.parts.ridge import Moments

INPUTS, OUTPUTS, COUNT = 9, 7, 200
SINGLE = 5e-4
"""Products of single precision, divided by a small eigenvalue of this data."""


def data(seed=0, *, offset=0.4):
    """X [N, D] and Y [N, P], correlated, float32."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(INPUTS, INPUTS, generator=generator)
    x = torch.randn(COUNT, INPUTS, generator=generator) @ mix + offset
    true = torch.randn(INPUTS, OUTPUTS, generator=generator)
    y = x @ true + 2 * torch.randn(COUNT, OUTPUTS, generator=generator) - 1.5
    return x, y


def moments(x, y, *cuts):
    sums = Moments(inputs=x.shape[1], outputs=y.shape[1], device=x.device)
    for part in torch.arange(len(x)).tensor_split(list(cuts)):
        sums.add(x[part], y[part])
    return sums


def centred(x, y):
    x, y = x.double().numpy(), y.double().numpy()
    return x - x.mean(0), y - y.mean(0)


def penalised(x, y, damping):
    """The same least-squares problem without a penalty: rows sqrt(lambda) I are appended."""
    xc, yc = centred(x, y)
    strength = damping * numpy.mean(numpy.sum(xc**2, axis=0))
    tall_x = numpy.vstack([xc, numpy.sqrt(strength) * numpy.eye(INPUTS)])
    return tall_x, numpy.vstack([yc, numpy.zeros((INPUTS, OUTPUTS))])


def test_without_damping_it_is_least_squares_with_an_intercept():
    x, y = data()
    weight, bias, _ = moments(x, y).ridge(0.0)
    ones = torch.ones(COUNT, 1, dtype=torch.float64)
    expected = torch.linalg.lstsq(torch.cat([x.double(), ones], 1), y.double()).solution
    assert torch.allclose(weight, expected[:-1], atol=SINGLE)
    assert torch.allclose(bias, expected[-1], atol=SINGLE)


@pytest.mark.parametrize("damping", [1e-3, 0.1, 3.0])
def test_damping_is_a_penalty_on_the_weights_only(damping):
    x, y = data()
    weight, bias, _ = moments(x, y).ridge(damping)
    expected = numpy.linalg.lstsq(*penalised(x, y, damping), rcond=None)[0]
    assert numpy.allclose(weight.numpy(), expected, atol=1e-4)
    residual = y.double() - x.double() @ weight - bias
    assert torch.allclose(residual.mean(0), torch.zeros(OUTPUTS, dtype=torch.float64), atol=1e-4)


def test_streaming_equals_one_shot():
    x, y = data()
    once, streamed = moments(x, y), moments(x, y, 1, 1, 17, 150)
    assert once.count == streamed.count == COUNT
    for a, b in zip(once.components(1e-3).take(3), streamed.components(1e-3).take(3), strict=True):
        assert torch.allclose(a.abs(), b.abs(), atol=SINGLE)
    for a, b in zip(once.ridge(1e-3), streamed.ridge(1e-3), strict=True):
        assert torch.allclose(a, b, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("damping", [0.0, 0.5])
@pytest.mark.parametrize("rank", [1, 3, OUTPUTS])
def test_reduced_rank_is_the_best_map_of_its_rank(rank, damping):
    """The optimum's error: what the full map misses, and the tail of the fit's spectrum."""
    x, y = data()
    down, up, bias = moments(x, y).components(damping).take(rank)
    assert down.shape == (INPUTS, rank) and up.shape == (rank, OUTPUTS)
    tall_x, tall_y = penalised(x, y, damping)
    full = numpy.linalg.lstsq(tall_x, tall_y, rcond=None)[0]
    spectrum = numpy.linalg.svd(tall_x @ full, compute_uv=False)
    best = numpy.sum((tall_y - tall_x @ full) ** 2) + numpy.sum(spectrum[rank:] ** 2)
    found = numpy.sum((tall_y - tall_x @ (down @ up).numpy()) ** 2)
    assert found == pytest.approx(best, rel=1e-5)
    assert torch.allclose(bias, y.double().mean(0) - x.double().mean(0) @ down @ up, atol=1e-4)


def test_no_descent_finds_a_better_map_of_rank_two():
    x, y = data()
    down, up, _ = moments(x, y).components(0.1).take(2)
    tall_x, tall_y = (torch.from_numpy(part) for part in penalised(x, y, 0.1))
    found = float((tall_y - tall_x @ down @ up).square().sum())
    reached = []
    for seed in range(3):
        torch.manual_seed(seed)
        a = torch.randn(INPUTS, 2, dtype=torch.float64)
        for _ in range(300):
            b = torch.linalg.lstsq(tall_x @ a, tall_y).solution
            a = torch.linalg.lstsq(tall_x, tall_y @ torch.linalg.pinv(b)).solution
        reached.append(float((tall_y - tall_x @ a @ b).square().sum()))
    assert found <= min(reached) * (1 + 1e-6)
    assert min(reached) == pytest.approx(found, rel=1e-4)


def test_full_rank_equals_ridge():
    x, y = data()
    weight, bias, _ = moments(x, y).ridge(1e-3)
    down, up, reduced_bias = moments(x, y).components(1e-3).take(OUTPUTS)
    assert torch.allclose(down @ up, weight, atol=1e-8)
    assert torch.allclose(reduced_bias, bias, atol=1e-8)


def test_constant_and_repeated_columns_are_harmless():
    x, y = data()
    x[:, 0], x[:, 1] = 2.0, x[:, 2]
    weight, bias, _ = moments(x, y).ridge(1e-3)
    fitted = x.double() @ weight + bias
    assert torch.isfinite(fitted).all()
    clean = x[:, 2:]
    expected, expected_bias, _ = moments(clean, y).ridge(1e-3)
    assert torch.allclose(fitted, clean.double() @ expected + expected_bias, atol=0.05)


def test_bfloat16_input_is_summed_in_double():
    x, y = (part.bfloat16() for part in data())
    sums = moments(x, y, 50)
    assert sums.xx.dtype == sums.y.dtype == torch.float64
    assert torch.allclose(sums.xy, x.double().T @ y.double(), rtol=1e-5, atol=1e-2)
