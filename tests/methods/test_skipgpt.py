"""SkipGPT against its equations, on a small model."""

from __future__ import annotations

import pytest
import torch

from methods.base import Budget, RoutedView, Site, StageBudget
from methods.engine.routed import attach, routed
from methods.engine.routing import routing_of
from methods.skipgpt import SkipGPT
from tests.methods.by_hand import evaluate
from tests.methods.conftest import small_ids, small_model


@pytest.fixture
def model():
    return small_model()


def test_both_routers_read_the_residual_that_enters_the_layer(model):
    method = attach(model, SkipGPT(sparsity=0.5)).eval()
    method.threshold.fill_(0.0)
    entering: dict[int, torch.Tensor] = {}
    for index, layer in enumerate(model.model.layers):
        layer.input_layernorm.register_forward_pre_hook(
            lambda _, args, index=index: entering.__setitem__(index, args[0])
        )
    _, seen = evaluate(model, method, small_ids(2, 9))
    assert set(seen) == set(method.sites())
    for site, decision in seen.items():
        head = method.routers.at(site).head
        execute, bypass = torch.nn.functional.linear(
            entering[site.layer], head.weight, head.bias
        ).unbind(-1)
        assert torch.allclose(decision.scores_BT, execute - bypass, atol=1e-5)
        assert torch.equal(
            decision.execute_BT, torch.softmax(torch.stack([execute, bypass], -1), -1)[..., 0] > 0.5
        )


@pytest.mark.parametrize("rate", [0.2, 0.9])
def test_loss_is_the_task_and_the_weighted_distance_to_the_target(rate):
    method = SkipGPT(sparsity=0.25)
    view = RoutedView(torch.tensor(2.0), torch.tensor(rate), {}, torch.zeros(()), 0.25)
    assert float(method._routed_loss(view)) == pytest.approx(2.0 + 8.0 * abs(0.75 - rate))


def test_training_moves_the_routers_of_every_unit_and_nothing_else(model):
    method = attach(model, SkipGPT(sparsity=0.5))
    method.threshold.fill_(0.0)
    one = StageBudget(1, 1, 8)
    (stage,) = method.stages(Budget("x", 8, 8, 8, one, one, one))
    torch.manual_seed(0)
    with routed(model, method):
        routing = routing_of(model)
        routing.training = True
        model(input_ids=small_ids(2, 9)).logits.square().mean().backward()
        gates = {site: decision.gate_BT for site, decision in routing.decisions.items()}
    assert set(gates) == set(method.sites()) == set(model_sites(model))
    assert all(set(gate.unique().tolist()) <= {0.0, 1.0} for gate in gates.values())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in stage.parameters)
    assert all(p.grad is None for p in model.parameters())


def model_sites(model):
    return [Site(i, k) for i in range(len(model.model.layers)) for k in ("attention", "mlp")]
