"""Router-Tuning against its equations, on a small model."""

from __future__ import annotations

import pytest
import torch

from methods.base import RoutedView, Site
from methods.engine.routed import attach
from methods.router_tuning import RouterTuning
from tests.methods.by_hand import BUDGET, ByHand, cross_entropy, evaluate, train_forward
from tests.methods.conftest import small_ids, small_model


@pytest.fixture
def model():
    return small_model(layers=4)


def scattered(model, **options):
    """A method whose routers are off their zero start."""
    method = attach(model, RouterTuning(sparsity=0.2, **options)).eval()
    torch.manual_seed(5)
    for parameter in method.routers.parameters():
        parameter.data.normal_(std=0.5)
    method.threshold.fill_(0.0)
    return method


def by_hand(model, method):
    """h += [sigmoid(w x) >= 0.5] A(x) with the identity as the mask's gradient; dense MLP."""

    def rule(index, layer, h, run):
        site = Site(index, "attention")
        mask = torch.ones(h.shape[:2])
        if site in method.sites():
            soft = torch.sigmoid(layer.input_layernorm(h) @ method.routers.at(site).head.weight[0])
            mask = (soft >= 0.5).float() + soft - soft.detach()
        h = h + mask[..., None] * run.attention(layer, h)
        return h + run.mlp(layer, h)

    return ByHand(model, rule)


def test_it_starts_at_zero_and_executes_everything(model):
    method = attach(model, RouterTuning(sparsity=0.2))
    method.threshold.fill_(0.0)
    assert all(p.abs().sum() == 0 for p in method.routers.parameters())
    ids = small_ids(2, 8)
    logits, decisions = train_forward(model, method, ids)
    assert torch.allclose(logits, model(input_ids=ids).logits, atol=1e-5)
    assert all(decision.execute_BT.all() for decision in decisions.values())


def test_logits_and_gradients_are_those_of_the_equation(model):
    method, ids = scattered(model), small_ids(2, 9)
    own, decisions = train_forward(model, method, ids)
    reference = by_hand(model, method)(ids)
    assert torch.allclose(own, reference, atol=1e-5)
    assert 0.1 < torch.stack([d.gate_BT for d in decisions.values()]).mean() < 0.9
    parameters = list(method.routers.parameters())
    got = torch.autograd.grad(cross_entropy(own, ids), parameters)
    expected = torch.autograd.grad(cross_entropy(reference, ids), parameters)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(got, expected, strict=True))
    assert torch.allclose(evaluate(model, method, ids)[0], reference, atol=1e-5)


def test_only_units_above_their_capacity_pay(model):
    method = attach(model, RouterTuning(sparsity=0.2, gradient_scale=3.0))
    rates = {site: torch.tensor(r) for site, r in zip(method.sites(), (0.9, 0.1), strict=False)}
    view = RoutedView(torch.tensor(2.0), torch.tensor(0.5), rates, torch.zeros(()), 0.2)
    capacity = 1 - 0.2 / (len(method.sites()) / 8)
    assert float(method._routed_loss(view)) == pytest.approx(2.0 + 3.0 * max(0.9 - capacity, 0))


@pytest.mark.parametrize(
    "layers, sparsity, expected",
    [
        (32, 0.1, range(15, 31)),
        (32, 0.25, range(11, 31)),
        (30, 0.4, range(30)),
        (30, 0.9, range(30)),
    ],
)
def test_the_published_half_widens_with_the_target(model, layers, sparsity, expected):
    method = RouterTuning(sparsity=sparsity)
    method.shape = attach(model, RouterTuning(sparsity=0.1)).shape.__class__(
        layers, 32, 4, 2, 12, 48, 61
    )
    assert [site.layer for site in method.sites()] == list(expected)
    assert {site.kind for site in method.sites()} == {"attention"}


def test_nothing_but_routers_is_trained(model):
    method = attach(model, RouterTuning(sparsity=0.2))
    (stage,) = method.stages(BUDGET)
    assert stage.lora is None
    assert {id(p) for p in stage.parameters} == {id(p) for p in method.routers.parameters()}
