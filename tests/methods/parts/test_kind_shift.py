"""The shift of the MLP scores, by brute force on a real routed model."""

from __future__ import annotations

import numpy
import pytest
import torch

from methods.engine.routed import attach
from methods.informed import Informed
from methods.parts.calibration import realising_threshold
from methods.parts.router_start import (
    MOST_SHIFTS,
    SHIFT_SHARE,
    SHIFT_STEP,
    TOLERANCE,
    fit_recoverability,
    shift_kinds,
)
from methods.parts.routers import Routers
from tests.methods.conftest import probe_for


@pytest.mark.parametrize("wrong_by", [0.0, 2.0, -2.0])
def test_kind_shift_ends_where_a_further_step_loses_more(tiny_llama, wrong_by):
    """Against brute force: the loss at every shift of a grid around the start."""
    method = attach(tiny_llama, Informed(sparsity=0.4, rank=4)).eval()
    probe = probe_for(tiny_llama, method)
    method.forecasters.solve(probe)
    fit_recoverability(probe, method.routers, method.forecasters)
    mlps = [site for site in method.sites() if site.kind == "mlp"]

    def shifted(amount):
        for site in mlps:
            method.routers.at(site).shift(amount)

    def loss():
        part = probe.sample()
        method.threshold.fill_(realising_threshold(part, 0.4, tolerance=TOLERANCE).threshold)
        return part.routed_loss()

    shifted(wrong_by)
    start = {site: method.routers.at(site).head.bias[0].item() for site in mlps}
    shift_kinds(probe, method.routers, method.threshold, 0.4)
    moves = [method.routers.at(site).head.bias[0].item() - start[site] for site in mlps]
    assert moves == pytest.approx([moves[0]] * len(moves), abs=1e-5)
    grid = {}
    for step in range(-MOST_SHIFTS, MOST_SHIFTS + 1):
        shifted(step * SHIFT_STEP - moves[0])
        grid[step] = loss()
        shifted(moves[0] - step * SHIFT_STEP)
    chosen = round(0.999 * moves[0] / SHIFT_STEP)  # of two places that lose alike, the first tried
    vertex = chosen  # of the parabola, where both neighbours were tried
    if abs(chosen) < MOST_SHIFTS:
        near = (chosen - 1, chosen, chosen + 1)
        bend, slope, _ = numpy.polyfit(near, [grid[place] for place in near], 2)
        if bend > 1e-9:  # where no decision turns, losses are equal, and the fit is rounding
            vertex = -slope / (2 * bend)
    assert moves[0] / SHIFT_STEP == pytest.approx(vertex, abs=0.02)
    assert grid[chosen] <= grid[0] + 1e-6
    for neighbour in (chosen - 1, chosen + 1):
        if abs(neighbour) < MOST_SHIFTS:
            assert grid[chosen] <= grid[neighbour] + 1e-6


def test_kind_shift_leaves_methods_of_one_kind_alone(tiny_llama):
    method = attach(tiny_llama, Informed(sparsity=0.2, rank=4)).eval()
    attention = [site for site in method.sites() if site.kind == "attention"]
    routers = Routers(kind="linear")
    routers.create(attention, method.shape)
    before = {k: v.clone() for k, v in routers.state_dict().items()}
    shift_kinds(probe_for(tiny_llama, method), routers, method.threshold, 0.2)
    assert all(torch.equal(before[k], v) for k, v in routers.state_dict().items())


def test_shifts_per_flop_are_compared_at_the_flops_of_the_start(tiny_llama):
    method = attach(tiny_llama, Informed(sparsity=0.4, rank=4)).eval()
    probe = probe_for(tiny_llama, method)
    method.forecasters.solve(probe)
    fit_recoverability(probe, method.routers, method.forecasters)
    part, seen = probe.sample(SHIFT_SHARE), []
    for site in method.sites():
        if site.kind == "mlp":
            method.routers.at(site).shift(2.0)  # a start that is left far behind
    before = realising_threshold(part, 0.4, tolerance=TOLERANCE)

    class Seen:
        """The probe's share, whose losses note what the routed model saves just then."""

        shape = probe.shape
        routed_scores = staticmethod(part.routed_scores)

        def sample(self, share):
            return self

        def routed_loss(self):
            scores = part.routed_scores(float(method.threshold))
            seen.append((1 - scores.flops_ratio, scores.sparsity))
            return part.routed_loss()

    shift_kinds(Seen(), method.routers, method.threshold, 0.4, per_flop=True)
    saved, sparsities = zip(*seen, strict=True)
    assert len(seen) > 3
    assert saved == pytest.approx([before.saved] * len(seen), abs=TOLERANCE)
    assert max(sparsities) - min(sparsities) > 2 * TOLERANCE


@pytest.mark.parametrize("saved", [0.1, 0.3])
def test_a_threshold_is_found_by_the_flops_that_it_saves(tiny_llama, saved):
    method = attach(tiny_llama, Informed(sparsity=0.4, rank=4)).eval()
    probe = probe_for(tiny_llama, method)
    method.forecasters.solve(probe)
    fit_recoverability(probe, method.routers, method.forecasters)
    found = realising_threshold(probe, 0.4, tolerance=0.01, saved=saved)
    seen = probe.routed_scores(found.threshold)
    assert 1 - seen.flops_ratio == pytest.approx(saved, abs=0.01)
    assert found.saved == pytest.approx(1 - seen.flops_ratio)
    assert seen.sparsity == pytest.approx(found.sparsity) != 0.4
