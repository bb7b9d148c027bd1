"""FlexiDepth against its equations, on a small model."""

from __future__ import annotations

import pytest
import torch

from methods.base import Decision, RoutedView, Site
from methods.engine.routed import attach, routed
from methods.flexidepth import FlexiDepth
from tests.methods.by_hand import BUDGET, ByHand, cross_entropy, evaluate, train_forward
from tests.methods.conftest import small_ids, small_model


@pytest.fixture
def model():
    return small_model(layers=4)


def made(model, **options):
    torch.manual_seed(4)
    method = attach(model, FlexiDepth(sparsity=0.25, reduction=4, **options)).eval()
    method.threshold.fill_(0.0)
    return method


def by_hand(model, method):
    """g B(h) above the threshold, (1 - g) adapter(norm h) below; attention sees all keys."""

    def rule(index, layer, h, run):
        site = Site(index, "block")
        if site not in method.sites():
            return run.block(layer, h)
        x = layer.input_layernorm(h)
        router = method.routers.modules_by_site[site.key]
        z = x @ router.down.weight.T
        z = router.norm.weight * z / (z.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        g = torch.sigmoid(
            torch.tanh(z) @ router.head[0].weight.T @ router.head[1].weight.T - method.threshold
        )
        adapter = method.adapters.modules_by_site[site.key]
        a, b = x @ adapter.gate.weight.T, x @ adapter.into.weight.T
        narrow = (a * torch.sigmoid(a) * b) @ adapter.up.weight.T
        if method.output == "whole":
            full, narrow = run.block(layer, h) - h, narrow
        else:
            full, narrow = g * (run.block(layer, h) - h), (1 - g) * narrow
        return h + torch.where(g > 0.5, full, narrow)

    return ByHand(model, rule)


@pytest.mark.parametrize("output", ["scaled", "whole"])
@pytest.mark.parametrize("threshold", [0.0, 0.2])
def test_inference_is_the_equation(model, output, threshold):
    method, ids = made(model, output=output), small_ids(3, 10)
    method.threshold.fill_(threshold)
    own, decisions = evaluate(model, method, ids)
    assert torch.allclose(own, by_hand(model, method)(ids), atol=1e-5)
    assert [site.layer for site in decisions] == [2, 3]
    rate = torch.stack([d.execute_BT for d in decisions.values()]).float().mean()
    assert 0.05 < rate < 0.95


def test_training_has_the_values_and_gradients_of_the_scaled_branches(model):
    method, ids = made(model), small_ids(2, 9)
    own, _ = train_forward(model, method, ids)
    reference = by_hand(model, method)(ids)
    assert torch.allclose(own, reference, atol=1e-5)
    parameters = list(method.parameters())
    got = torch.autograd.grad(cross_entropy(own, ids), parameters)
    wanted = torch.autograd.grad(cross_entropy(reference, ids), parameters)
    assert sum(float(g.abs().sum()) for g in wanted) > 0.1
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, wanted, strict=True))


def test_a_straight_through_gate_has_whole_values_and_a_gradient(model):
    method, ids = made(model, output="whole"), small_ids(2, 9)
    own, _ = train_forward(model, method, ids)
    assert torch.allclose(own, by_hand(model, method)(ids), atol=1e-5)
    grads = torch.autograd.grad(cross_entropy(own, ids), list(method.parameters()))
    assert all(float(g.abs().sum()) > 0 for g in grads)


@pytest.mark.parametrize("mode", ["masked", "gathered"])
def test_a_bypassed_token_still_writes_its_keys_and_values(model, mode):
    method, ids = made(model), small_ids(1, 7)
    method.threshold.fill_(100.0)
    with torch.no_grad(), routed(model, method, mode):
        cache = model(input_ids=ids, use_cache=True).past_key_values
    layer = model.model.layers[2]
    with torch.no_grad():
        dense = model(input_ids=ids, output_hidden_states=True).hidden_states[2]
        value = layer.self_attn.v_proj(layer.input_layernorm(dense))
    assert cache.layers[2].values.shape[2] == cache.layers[3].values.shape[2] == 7
    wanted = value.view(1, 7, 2, -1).transpose(1, 2)
    assert torch.allclose(cache.layers[2].values, wanted, atol=1e-5)


def test_the_loss_adds_the_mean_squared_depth(model):
    method = made(model, depth_weight=0.5)
    scores = torch.tensor([[[0.3, -1.0, 2.0]], [[1.0, 0.0, -2.0]]])
    decisions = {
        site: Decision(s > 0, (s > 0).float(), s)
        for site, s in zip(method.sites(), scores, strict=True)
    }
    valid = torch.tensor([[True, True, False]])
    view = RoutedView(
        torch.tensor(2.0), torch.tensor(0.5), {}, torch.zeros(()), 0.25, decisions, valid
    )
    g = torch.sigmoid(scores)
    depth = [float(g[0, 0, t] + g[1, 0, t]) for t in range(2)]
    expected = 2.0 + 0.5 * (depth[0] ** 2 + depth[1] ** 2) / 2
    assert float(method._routed_loss(view)) == pytest.approx(expected, abs=1e-6)


def test_routers_and_adapters_are_trained_and_the_backbone_is_not(model):
    method = made(model)
    (stage,) = method.stages(BUDGET)
    assert stage.lora is None
    assert {id(p) for p in stage.parameters} == {id(p) for p in method.parameters()}


def test_adapters_alone_are_trained_on_hard_decisions(model):
    method = made(model, train="adapters")
    (stage,) = method.stages(BUDGET)
    assert stage.hard and stage.per_target
    assert {id(p) for p in stage.parameters} == {id(p) for p in method.adapters.parameters()}
    view = RoutedView(torch.tensor(2.0), torch.tensor(0.5), {}, torch.zeros(()), 0.25)
    assert float(stage.loss(view)) == 2.0
