"""Router inputs by their definition; the balanced constraint on a real routed model."""

from __future__ import annotations

import pytest
import torch

from methods.base import RoutedView, Site
from methods.engine.routed import attach
from methods.informed import Informed
from methods.parts.balance import MOST_SHIFTS, SHIFT_STEP, balanced_penalty, shift_kinds
from methods.parts.calibration import realising_threshold
from methods.parts.forecaster import Forecasters
from methods.parts.inputs import RouterInput
from methods.parts.recoverability import log_error
from methods.parts.routers import Routers
from tests.methods.conftest import probe_for
from tests.methods.parts.text import SHAPE, MadeUp, linear_views

SITE = Site(0, "mlp")


@pytest.fixture
def forecasters():
    made = Forecasters(rank=3)
    made.create([SITE], SHAPE.width)
    for layer in (made.at(SITE).down, made.at(SITE).up):
        torch.nn.init.normal_(layer.weight)
    return made


def made_input(forecasters, **options):
    built = RouterInput(
        forecasters=forecasters, **({"source": "post_norm", "features": ()} | options)
    )
    return built, built.create([SITE], SHAPE.width)


def test_sources(forecasters):
    x, residual = torch.randn(2, 5, SHAPE.width), torch.randn(2, 5, SHAPE.width)
    for source, expected in (("post_norm", x), ("residual", residual)):
        built, width = made_input(forecasters, source=source)
        assert width == SHAPE.width and torch.equal(built(SITE, x, residual), expected)
        assert built.cost(SITE) == 0.0 and not list(built.parameters())


def test_features_are_the_forecasts_norm_and_its_regressed_error(forecasters):
    views = linear_views([SITE], tokens=400, batches=1, noise=0.3, rank=4, seed=1)
    built, width = made_input(
        forecasters, features=["forecast_norm", "code_norm", "predicted_error"]
    )
    built.fit(MadeUp({"train": views}), damping=1e-3)
    x, residual = views[0].x_ND, views[0].residual_ND
    read = built(SITE, x, residual).detach()
    assert width == read.shape[-1] == SHAPE.width + 3
    assert torch.equal(read[:, :-3], x)
    norm = forecasters(SITE, x).detach().norm(dim=-1)
    assert torch.allclose(read[:, -3].exp(), norm, rtol=1e-3)
    down = forecasters.at(SITE).down
    code = (x @ down.weight.T + down.bias).detach()
    assert torch.allclose(read[:, -2].exp(), code.square().sum(-1).sqrt(), rtol=1e-3)
    truth = (log_error(views[0], forecasters) - residual.norm(dim=-1).log()).detach()
    correlation = torch.corrcoef(torch.stack([read[:, -1], truth]))[0, 1]
    assert correlation > 0.3
    assert float(read[:, -1].mean()) == pytest.approx(float(truth.mean()), abs=0.02)
    parts = 2.0 * SHAPE.width, forecasters.flops_per_token(SITE), 2.0 * down.weight.numel()
    assert built.cost(SITE) == sum(parts)


@pytest.mark.parametrize("options", [{"source": "embedding"}, {"features": ["colour"]}])
def test_unknown_choices_are_named(forecasters, options):
    with pytest.raises(ValueError, match="router_"):
        made_input(forecasters, **options)


def test_features_reach_the_decision(tiny_llama):
    method = attach(tiny_llama, Informed(sparsity=0.4, rank=4, router_features=["forecast_norm"]))
    head = method.routers.at(Site(1, "mlp")).head
    with torch.no_grad():
        head.weight.zero_()
        head.weight[0, -1] = 1.0
        head.bias.zero_()
    x = torch.randn(1, 6, 64)
    scores = method.routers(Site(1, "mlp"), method.router_input(Site(1, "mlp"), x, x))
    norm = method.forecasters(Site(1, "mlp"), x).norm(dim=-1)
    assert torch.allclose(scores, (norm + 1e-6).log(), atol=1e-4)


def test_penalty_is_the_mean_gap_of_the_kinds():
    rates = {Site(0, "attention"): 0.9, Site(1, "attention"): 0.7, Site(0, "mlp"): 0.3}
    tensors = {site: torch.tensor(rate, requires_grad=True) for site, rate in rates.items()}
    view = RoutedView(torch.zeros(()), torch.zeros(()), tensors, torch.zeros(()), 0.4)
    penalty = balanced_penalty(view, weight=8.0)
    assert float(penalty) == pytest.approx(8.0 * (abs(0.6 - 0.8) + abs(0.6 - 0.3)) / 2)
    penalty.backward()
    assert float(tensors[Site(0, "attention")].grad) == pytest.approx(2.0)
    assert float(tensors[Site(0, "mlp")].grad) == pytest.approx(-4.0)


def test_balanced_kinds_bypass_the_same_share_of_tokens(tiny_llama):
    method = attach(tiny_llama, Informed(sparsity=0.4, rank=4, balanced=True)).eval()
    probe = probe_for(tiny_llama, method)
    method.forecasters.solve(probe)
    method._start_routers(probe)
    shares = {}
    for balanced in (False, True):
        method.balanced = balanced
        method.calibrate(probe, 0.4)
        seen = probe.routed_scores(float(method.threshold))
        bypassed = seen.scores <= float(method.threshold)
        shares[balanced] = [float(bypassed[k].float().mean()) for k in (~seen.is_mlp, seen.is_mlp)]
        assert seen.sparsity == pytest.approx(0.4, abs=0.01)
    assert abs(shares[False][0] - shares[False][1]) > 0.03
    assert shares[True] == pytest.approx([0.4, 0.4], abs=0.01)


def test_balanced_training_knows_one_target():
    with pytest.raises(ValueError, match="targets"):
        Informed(sparsity=0.4, balanced=True, train="routers", targets=[0.2, 0.4])


@pytest.mark.parametrize("wrong_by", [0.0, 2.0, -2.0])
def test_kind_shift_ends_where_a_further_step_loses_more(tiny_llama, wrong_by):
    """Against brute force: the loss at every shift of a grid around the start."""
    method = attach(tiny_llama, Informed(sparsity=0.4, rank=4)).eval()
    probe = probe_for(tiny_llama, method)
    method.forecasters.solve(probe)
    method._start_routers(probe)
    mlps = [site for site in method.sites() if site.kind == "mlp"]

    def shifted(amount):
        for site in mlps:
            method.routers.at(site).shift(amount)

    def loss():
        part = probe.sample()
        method.threshold.fill_(realising_threshold(part, 0.4, tolerance=0.004).threshold)
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
    chosen = round(moves[0] / SHIFT_STEP)
    assert moves[0] == pytest.approx(chosen * SHIFT_STEP, abs=1e-5)
    assert grid[chosen] <= grid[0] + 1e-6
    for neighbour in (chosen - 1, chosen + 1):
        if abs(neighbour) < MOST_SHIFTS:
            assert grid[chosen] <= grid[neighbour] + 1e-6


def test_kind_shift_leaves_methods_of_one_kind_alone(tiny_llama):
    method = attach(tiny_llama, Informed(sparsity=0.2, rank=4)).eval()
    attention = [site for site in method.sites() if site.kind == "attention"]
    routers = Routers(kind="linear")
    routers.create(attention, method.shape.width)
    before = {k: v.clone() for k, v in routers.state_dict().items()}
    shift_kinds(probe_for(tiny_llama, method), routers, method.threshold, 0.2)
    assert all(torch.equal(before[k], v) for k, v in routers.state_dict().items())
