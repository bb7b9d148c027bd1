"""Routers: kinds, widths, decisions, and the regression that starts them."""

from __future__ import annotations

import math

import numpy
import pytest
import torch

from methods.base import Site
from methods.parts.forecaster import Forecasters
from methods.parts.router_start import EPSILON, fit_recoverability, log_error
from methods.parts.routers import Router, Routers
from tests.methods.parts.text import SHAPE, MadeUp, linear_views

SITES = [Site(0, "mlp"), Site(1, "attention")]
SLOPES = {SITES[0]: 3e-4, SITES[1]: 2e-2}


@pytest.mark.parametrize(
    ("options", "shapes"),
    [
        ({"kind": "linear", "outputs": 1}, [(1, 64), (1,)]),
        ({"kind": "linear", "outputs": 2}, [(2, 64), (2,)]),
        ({"kind": "linear", "outputs": 1, "bias": False}, [(1, 64)]),
        ({"kind": "mlp", "outputs": 2}, [(16, 64), (16,), (2, 16), (2,)]),
        ({"kind": "mlp", "outputs": 2, "hidden": 5}, [(5, 64), (5,), (2, 5), (2,)]),
    ],
)
def test_kinds_and_widths(options, shapes):
    """A quarter of the width where none is given: d/4 - 200 of the published code needs d > 800."""
    router = Router(width=64, **options)
    assert [tuple(parameter.shape) for parameter in router.parameters()] == shapes
    assert router(torch.randn(2, 3, 64)).shape == (2, 3)


@pytest.mark.parametrize("width", [4, 16, 128, 576, 800, 4096])
def test_an_mlp_router_exists_at_every_width(width):
    router = Router(width=width, kind="mlp", outputs=2)
    assert router.head.in_features == width // 4
    assert torch.isfinite(router(torch.randn(3, width))).all()


@pytest.mark.parametrize("options", [{"kind": "mlp", "hidden": -3}, {"kind": "mlp", "width": 3}])
def test_bad_options_are_one_clear_line(options):
    with pytest.raises(ValueError, match="router"):
        Router(**{"width": 64, **options})


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_two_logits_decide_as_their_softmax(kind):
    torch.manual_seed(0)
    router, x = Router(width=32, kind=kind, outputs=2), torch.randn(500, 32)
    features = x if router.inner is None else torch.relu(router.inner(x))
    probability = torch.softmax(router.head(features), -1)[:, 0]
    assert torch.equal(router(x) > 0, probability > 0.5)
    assert torch.allclose(torch.sigmoid(router(x)), probability, atol=1e-6)
    assert 0.1 < float((router(x) > 0).float().mean()) < 0.9


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_set_head_makes_the_score(kind, outputs):
    torch.manual_seed(0)
    router, x = Router(width=32, kind=kind, outputs=outputs), torch.randn(9, 32)
    weight = torch.randn(router.head.in_features)
    router.set_head(weight, -0.7)
    assert torch.allclose(router(x), router.features(x) @ weight - 0.7, atol=1e-5)


def test_scores_are_float32_in_any_model():
    router = Router(width=32, kind="mlp", outputs=2)
    assert router(torch.randn(2, 32).bfloat16()).dtype == torch.float32


def test_one_router_per_site():
    routers = Routers(kind="mlp", hidden=3, outputs=2)
    routers.create(SITES, SHAPE)
    assert SITES[0] in routers and Site(0, "attention") not in routers
    assert routers.at(SITES[0]) is not routers.at(SITES[1])
    x = torch.randn(4, 12)
    assert torch.equal(routers(SITES[1], x), routers.at(SITES[1])(x))


def views(seed, tokens=250):
    """Two batches of each unit, and of one that nobody routes."""
    sites = [*SITES, Site(1, "mlp")]
    made = linear_views(sites, tokens=tokens, batches=2, noise=0.2, rank=4, seed=seed)
    for view in made:
        view.y_ND = view.y_ND * (1 + view.x_ND[:, :1].abs())
    return made


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("sensitivity", [True, False])
@pytest.mark.parametrize("bypass", ["skip", "forecast"])
def test_recoverability_equals_numpy(bypass, sensitivity, kind):
    torch.manual_seed(0)
    probe = MadeUp({"train": views(1)}, SLOPES if sensitivity else None)
    forecasters = None
    if bypass == "forecast":
        forecasters = Forecasters(rank=2)
        forecasters.create(SITES, SHAPE)
        forecasters.solve(probe)
    routers = Routers(kind=kind, hidden=6, outputs=2)
    routers.create(SITES, SHAPE)
    fit_recoverability(probe, routers, forecasters, damping=0.01, sensitivity=sensitivity)
    for site in SITES:
        own = [view for view in probe.views["train"] if view.site == site]
        x = torch.cat([view.x_ND for view in own])
        missed = torch.cat([view.y_ND for view in own])
        if forecasters is not None:
            missed = missed - forecasters(site, x).detach()
        target = numpy.log(numpy.linalg.norm(missed.double().numpy(), axis=1) + EPSILON)
        if sensitivity:
            target += math.log(SLOPES[site])
        else:
            stream = torch.cat([view.residual_ND for view in own]).double().numpy()
            target -= numpy.log(numpy.linalg.norm(stream, axis=1) + EPSILON)
        expected = ridge_fit(routers.at(site).features(x).detach().double().numpy(), target, 0.01)
        assert numpy.allclose(routers(site, x).detach().numpy(), expected, atol=1e-3)
        assert numpy.corrcoef(expected, target)[0, 1] > 0.1


def test_harm_per_flop_lowers_scores_by_half_the_log_of_what_is_saved():
    """error^2 / saved orders tokens as error / sqrt(saved) does."""
    probe, found = MadeUp({"train": views(1)}, SLOPES), []
    saved = {site: 10.0 ** (2 + index) for index, site in enumerate(SITES)}
    for saves in (None, saved.__getitem__):
        routers = Routers()
        routers.create(SITES, SHAPE)
        fit_recoverability(probe, routers, None, saves=saves)
        found.append({site: routers(site, view.x_ND) for site in SITES for view in views(1)})
    for site in SITES:
        ratio = (found[0][site] - found[1][site]).exp()
        assert torch.allclose(ratio, torch.tensor(saved[site]).sqrt(), rtol=1e-3)


def ridge_fit(features, target, damping):
    """Fitted values of a centred ridge regression, solved as an augmented least squares."""
    centred = features - features.mean(0)
    strength = math.sqrt(damping * (centred**2).sum(0).mean())
    tall = numpy.vstack([centred, strength * numpy.eye(features.shape[1])])
    goal = numpy.concatenate([target - target.mean(), numpy.zeros(features.shape[1])])
    return centred @ numpy.linalg.lstsq(tall, goal, rcond=None)[0] + target.mean()


def test_error_of_an_exact_forecast_is_finite():
    view = views(1)[0]
    view.y_ND = torch.zeros_like(view.y_ND)
    assert torch.allclose(log_error(view, None), torch.tensor(math.log(EPSILON)))
