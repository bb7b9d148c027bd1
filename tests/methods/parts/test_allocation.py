"""Rank allocation against brute force, and what a direction of a regression is worth."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from methods.base import Site
from methods.parts.forecaster import Forecasters
from methods.parts.ridge import Moments, allocated
from tests.methods.parts.text import SHAPE, MadeUp, linear_views

SITES = [Site(0, "attention"), Site(0, "mlp"), Site(1, "mlp")]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.floats(0.0, 1.0), min_size=4, max_size=4), min_size=3, max_size=3))
def test_no_other_split_of_the_total_gains_more(lists):
    gains = {s: torch.tensor(sorted(v)) for s, v in zip(SITES, lists, strict=True)}
    found = allocated(gains, dict.fromkeys(SITES, 2), least=0.5, most=2.0)
    assert sum(found.values()) == 6 and all(1 <= r <= 4 for r in found.values())
    worth = lambda ranks: sum(float(gains[s][-r:].sum()) for s, r in ranks.items())  # noqa: E731
    splits = [c for c in itertools.product(range(1, 5), repeat=3) if sum(c) == 6]
    best = max(worth(dict(zip(SITES, c, strict=True))) for c in splits)
    assert worth(found) == pytest.approx(best, abs=1e-6)


def test_a_directions_value_is_the_error_that_it_avoids():
    views = linear_views([SITES[0]], tokens=400, batches=1, noise=0.5, rank=6, seed=1)
    x, y = views[0].x_ND, views[0].y_ND
    moments = Moments(inputs=SHAPE.width, outputs=SHAPE.width, device=x.device)
    moments.add(x, y)
    solved = moments.components(1e-9)
    errors = []
    for rank in (3, 4, 5):
        down, up, bias = (t.double() for t in solved.take(rank))
        errors.append(float((y.double() - x.double() @ down @ up - bias).square().sum(-1).mean()))
    steps = [a - b for a, b in itertools.pairwise(errors)]
    assert steps == pytest.approx(solved.values.flip(0)[3:5].tolist(), rel=1e-3)
    assert min(steps) > 0.01


def test_rank_moves_to_the_unit_that_the_loss_feels():
    views = linear_views(SITES, tokens=300, batches=1, noise=0.1, rank=8, seed=1)
    slopes = {SITES[0]: 1.0, SITES[1]: 1e-4, SITES[2]: 1e-4}
    forecasters = Forecasters(rank=3, allocate=True)
    forecasters.create(SITES, SHAPE)
    forecasters.solve(MadeUp({"train": views}, slopes))
    ranks = [forecasters.at(site).rank for site in SITES]
    assert sum(ranks) == 9 and ranks[0] > 5
    assert forecasters.flops_per_token(SITES[0]) == 4.0 * SHAPE.width * ranks[0]
