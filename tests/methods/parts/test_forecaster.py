"""Forecasters: the two fits on known units, and their measured quality against numpy."""

from __future__ import annotations

import numpy
import pytest
import torch
from torch.nn import functional

from methods.base import Site, StageBudget
from methods.parts.forecaster import (
    Forecaster,
    ForecasterOptions,
    Forecasters,
)
from tests.methods.parts.text import SHAPE, MadeUp, linear_views

SITES = [Site(0, "attention"), Site(1, "mlp")]
BUDGET = StageBudget(steps=10, batch_size=1, seq_len=1)
NOISE, RANK = 0.3, 3


def probe(*, noise=NOISE):
    """Train and calibration text of two rank-3 units."""
    common = {"tokens": 300, "noise": noise, "rank": RANK}
    train = linear_views(SITES, batches=4, seed=1, **common)
    return MadeUp({"train": train, "calibration": linear_views(SITES, batches=2, seed=2, **common)})


def forecasters(*, sites=SITES, rank=RANK, **options):
    torch.manual_seed(0)
    made = Forecasters(rank=rank, options=ForecasterOptions(**options))
    made.create(sites, SHAPE)
    return made


def descend(made, seen, *, steps=600):
    """The stage's loss with plain Adam."""
    stage = made.stage(BUDGET)
    optimiser = torch.optim.Adam(stage.parameters, lr=0.02)
    for _ in range(steps):
        optimiser.zero_grad()
        sum(stage.loss(view) for view in seen.views["train"]).backward()
        optimiser.step()


def possible(seen):
    """Share of the calibration outputs' variance that is not noise, mean per kind."""
    shares = {}
    for site in SITES:
        y = numpy.concatenate([v.y_ND for v in seen.views["calibration"] if v.site == site])
        total = ((y - y.mean(0)) ** 2).sum() / len(y)
        shares[f"explained_variance_{site.kind}"] = 1 - SHAPE.width * NOISE**2 / total
    return shares


def test_closed_form_reaches_the_noise_and_sgd_does_not_pass_it():
    seen, closed = probe(), forecasters()
    closed.solve(seen)
    found, limit = closed.explained_variance(seen), possible(seen)
    assert found.keys() == limit.keys()
    sgd = forecasters(fit="sgd")
    at_start = sgd.explained_variance(seen)
    descend(sgd, seen)
    reached = sgd.explained_variance(seen)
    for kind, best in limit.items():
        assert 0.5 < best < 0.99
        assert found[kind] == pytest.approx(best, abs=0.02)
        assert at_start[kind] < 0.1 < reached[kind] <= found[kind] + 0.005
        assert reached[kind] > 0.9 * found[kind]


def test_noiseless_units_are_solved_exactly():
    seen, made = probe(noise=0.0), forecasters(damping=0.0)
    made.solve(seen)
    for view in seen.views["calibration"]:
        assert torch.allclose(made(view.site, view.x_ND), view.y_ND, atol=1e-3)


def test_a_rank_too_small_explains_less():
    seen = probe()
    values = []
    for rank in (1, 2, RANK):
        made = forecasters(rank=rank)
        made.solve(seen)
        values.append(made.explained_variance(seen)["explained_variance_mlp"])
    assert values[0] < values[1] - 0.02 < values[2] - 0.04


def test_sites_without_a_forecaster_are_left_out():
    seen, made = probe(), forecasters(sites=SITES[:1])
    made.solve(seen)
    assert made.explained_variance(seen).keys() == {"explained_variance_attention"}
    foreign = next(view for view in seen.views["train"] if view.site == SITES[1])
    assert float(made._regression_loss(foreign)) == 0.0


def test_explained_variance_equals_numpy():
    seen, made = probe(), forecasters()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.3)
    found = made.explained_variance(seen)
    for kind, site in (("attention", SITES[0]), ("mlp", SITES[1])):
        own = [view for view in seen.views["calibration"] if view.site == site]
        y = torch.cat([view.y_ND for view in own]).double().numpy()
        guess = made(site, torch.cat([view.x_ND for view in own])).detach().double().numpy()
        expected = 1 - ((y - guess) ** 2).sum() / ((y - y.mean(0)) ** 2).sum()
        assert found[f"explained_variance_{kind}"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("activation", ["silu", "identity"])
def test_forward_is_two_linears_around_the_activation(activation):
    torch.manual_seed(0)
    module = Forecaster(width=SHAPE.width, rank=4, activation=activation)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    x = torch.randn(2, 5, SHAPE.width)
    inner = functional.linear(x, module.down.weight, module.down.bias)
    inner = inner * torch.sigmoid(inner) if activation == "silu" else inner
    expected = functional.linear(inner, module.up.weight, module.up.bias)
    assert torch.allclose(module(x), expected, atol=1e-6)
    assert module(x.bfloat16()).dtype == torch.bfloat16
    assert all(parameter.dtype == torch.float32 for parameter in module.parameters())


def test_published_start_is_small_normal():
    torch.manual_seed(0)
    module = Forecaster(width=400, rank=100)
    for layer in (module.down, module.up):
        assert float(layer.weight.std()) == pytest.approx(1e-3, rel=0.02)
        assert abs(float(layer.weight.mean())) < 3e-5
        assert not layer.bias.any()


def test_regression_loss_is_smooth_l1():
    seen, made = probe(), forecasters(fit="sgd", activation="silu")
    view = seen.views["train"][0]
    error = numpy.abs((made(view.site, view.x_ND) - view.y_ND).detach().numpy())
    expected = numpy.where(error < 1, 0.5 * error**2, error - 0.5).mean()
    loss = made.stage(BUDGET).loss(view)
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_stages_follow_the_recipe():
    closed = forecasters().stage(BUDGET)
    assert closed.fit is not None and closed.loss is None and not closed.per_target
    sgd = forecasters(fit="sgd", activation="silu", lr=1e-3).stage(BUDGET)
    assert (sgd.forward, sgd.schedule, sgd.lr, sgd.budget) == ("dense", "cosine", 1e-3, BUDGET)
    assert sgd.fit is None and not sgd.per_target
    assert len(sgd.parameters) == 4 * len(SITES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must lie in 1..12"),
        ({"rank": 13}, "rank must lie in 1..12"),
        ({"fit": "closed_form", "activation": "silu"}, "must be 'identity'"),
    ],
)
def test_bad_options_are_one_clear_line(options, message):
    with pytest.raises(ValueError, match=message):
        forecasters(**options)


def test_ranks_of_saved_tensors_are_adopted():
    sites = [Site(0, "mlp"), Site(1, "mlp")]
    saved, loaded = Forecasters(rank=3), Forecasters(rank=3)
    for made in (saved, loaded):
        made.create(sites, SHAPE)
    saved.resize(sites[0], 5)
    shapes = {f"x.{name}": value.shape for name, value in saved.state_dict().items()}
    loaded.adopt(shapes, "x.")
    loaded.load_state_dict(saved.state_dict())
    assert [loaded.at(site).rank for site in sites] == [5, 3]
