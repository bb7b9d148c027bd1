"""DiffSkip against its equations, on a small model."""

from __future__ import annotations

import pytest
import torch

from methods.base import Site
from methods.diffskip import DiffSkip
from methods.engine.routed import attach
from runners.corpus.rows import ProbeText
from runners.training.probe import ModelProbe
from tests.methods.by_hand import BUDGET, ByHand, cross_entropy, evaluate, train_forward
from tests.methods.conftest import small_ids, small_model

TEXT = ProbeText(
    train=small_ids(64, 16, seed=1),
    calibration=small_ids(16, 16, seed=2),
    sensitivity=small_ids(2, 16),
)


@pytest.fixture
def model():
    return small_model(layers=4)


def made(model, **options):
    torch.manual_seed(4)
    method = attach(model, DiffSkip(sparsity=0.15, adapter_width=6, **options)).eval()
    method.threshold.fill_(0.0)
    return method


def silu(x):
    return x * torch.sigmoid(x)


def by_hand(model, method):
    """MLP or adapter by sigmoid of a linear map of what attention added, over the stream's RMS."""

    def rule(index, layer, h, run):
        site, after = Site(index, "mlp"), h + run.attention(layer, h)
        if site not in method.sites():
            return after + run.mlp(layer, after)
        size = (after.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        head = method.routers.at(site).head
        score = ((after - h) / size) @ head.weight[0] + head.bias - method.threshold
        adapter, x = method.adapters.at(site), layer.post_attention_layernorm(after)
        narrow = silu(x @ adapter.into.weight.T + adapter.into.bias) @ adapter.up.weight.T
        both = torch.stack([narrow + adapter.up.bias, run.mlp(layer, after)])
        soft = torch.sigmoid(score)
        gate = ((score > 0).float() + soft - soft.detach())[..., None]
        return after + (1 - gate) * both[0] + gate * both[1]

    return ByHand(model, rule)


@pytest.mark.parametrize("threshold", [0.0, 0.1])
def test_inference_is_the_equation(model, threshold):
    method, ids = made(model), small_ids(3, 10)
    method.threshold.fill_(threshold)
    own, decisions = evaluate(model, method, ids)
    assert torch.allclose(own, by_hand(model, method)(ids), atol=1e-5)
    assert {site.layer for site in decisions} == {2, 3}
    rates = {s: float(d.execute_BT.float().mean()) for s, d in decisions.items()}
    assert {site.kind for site in rates} == {"mlp"}  # attention always runs
    assert 0.05 < sum(rates.values()) / 2 < 0.95


def test_training_has_the_values_and_gradients_of_a_straight_through_gate(model):
    method, ids = made(model), small_ids(2, 9)
    own, _ = train_forward(model, method, ids)
    reference = by_hand(model, method)(ids)
    assert torch.allclose(own, reference, atol=1e-5)
    parameters = list(method.parameters())
    got = torch.autograd.grad(cross_entropy(own, ids), parameters)
    wanted = torch.autograd.grad(cross_entropy(reference, ids), parameters)
    assert sum(float(g.abs().sum()) for g in wanted) > 0.1
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize(("sparsity", "first"), [(0.15, 2), (0.25, 1), (0.4, 0)])
def test_the_latter_half_is_routed_or_what_the_target_needs(model, sparsity, first):
    method = attach(model, DiffSkip(sparsity=sparsity))
    assert [s.layer for s in method.sites()] == list(range(first, 4))
    assert method.reach() == (4 - first) / 8


def test_the_closed_form_scores_what_the_adapter_misses(model):
    """Both from the dense model: no router sees another input in training than in the fit."""
    method = made(model, start="closed_form")
    probe = ModelProbe(model, method, TEXT)
    *starts, _ = method.stages(BUDGET)
    for stage in starts:
        stage.fit(probe)
    found = {}

    def visit(view):
        if view.site in method.routers:
            missed = (view.y_ND - method.adapters(view.site, view.x_ND)).norm(dim=-1).log()
            scores = method.routers(view.site, method.read_unit(view))
            explained = (
                1 - (missed.exp() ** 2).sum() / (view.y_ND - view.y_ND.mean(0)).square().sum()
            )
            row = torch.stack([missed, scores])
            found.setdefault(view.site, []).append((row, explained))

    probe.stream(visit)
    assert len(found) == 2
    for parts in found.values():
        assert torch.corrcoef(torch.cat([row for row, _ in parts], 1))[0, 1] > 0.2
        assert all(explained > 0.2 for _, explained in parts)
