"""Mixture-of-Depths against its equations, on a small model."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from methods.base import Site
from methods.engine.routed import attach
from methods.mod import MoD
from methods.parts.gates import top_share
from tests.methods.by_hand import BUDGET, ByHand, cross_entropy, evaluate, train_forward
from tests.methods.conftest import small_ids, small_model


@pytest.fixture
def model():
    return small_model(layers=4)


def made(model, **options):
    torch.manual_seed(2)
    method = attach(model, MoD(sparsity=0.25, **options)).eval()
    method.threshold.fill_(0.0)
    return method


def by_hand(model, method, *, training, membership=None):
    """Raposo et al., equation 1: the chosen tokens attend among themselves, others pass."""

    def rule(index, layer, h, run):
        site = Site(index, "block")
        if site not in method.sites():
            return run.block(layer, h)
        head = method.routers.at(site).head
        score = (h @ head.weight.T + head.bias)[..., 0]
        weight = torch.sigmoid(score - method.threshold)
        chosen = score > method.threshold
        if training:
            keep = round((1 - 0.25 / method.reach()) * h.shape[1])
            chosen = torch.zeros_like(score, dtype=torch.bool)
            chosen.scatter_(1, score.topk(keep, dim=1).indices, True)
            if membership is not None:
                membership.append(
                    functional.binary_cross_entropy(torch.sigmoid(score), chosen.float())
                )
        update = run.block(layer, h, chosen) - h
        if method.output == "scaled":
            factor = weight[..., None]
        else:
            factor = (1 + weight - weight.detach() if training else 1 + 0 * weight)[..., None]
        return torch.where(chosen[..., None], h + factor * update, h)

    return ByHand(model, rule)


@pytest.mark.parametrize("layers, expected", [("alternate", [1, 3]), ("every", [0, 1, 2, 3])])
def test_which_blocks_are_routed(model, layers, expected):
    method = made(model, layers=layers)
    assert [(s.layer, s.kind) for s in method.sites()] == [(i, "block") for i in expected]
    assert method.reach() == len(expected) / 4


@pytest.mark.parametrize("output", ["whole", "scaled"])
def test_training_is_expert_choice_with_attention_among_the_chosen(model, output):
    method, ids, terms = made(model, output=output), small_ids(2, 8), []
    own, decisions = train_forward(model, method, ids)
    reference = by_hand(model, method, training=True, membership=terms)(ids)
    assert torch.allclose(own, reference, atol=1e-5)
    assert all((d.execute_BT.sum(1) == 4).all() for d in decisions.values())
    auxiliary = torch.stack([d.auxiliary for d in decisions.values()])
    assert torch.allclose(auxiliary, torch.stack(terms), atol=1e-6)
    parameters = list(method.routers.parameters())
    got = torch.autograd.grad(cross_entropy(own, ids) + auxiliary.mean(), parameters)
    wanted = torch.autograd.grad(
        cross_entropy(reference, ids) + torch.stack(terms).mean(), parameters
    )
    assert sum(float(g.abs().sum()) for g in wanted) > 0.01
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("output", ["whole", "scaled"])
def test_inference_decides_token_by_token(model, output):
    method, ids = made(model, output=output), small_ids(3, 9)
    own, decisions = evaluate(model, method, ids)
    assert torch.allclose(own, by_hand(model, method, training=False)(ids), atol=1e-5)
    rates = {float(d.execute_BT.float().mean()) for d in decisions.values()}
    assert rates - {0.0, 1.0}


def test_the_predictor_learns_from_a_detached_stream_and_decides_alone(model):
    method, ids = made(model, decision="predictor"), small_ids(2, 8)
    _, decisions = train_forward(model, method, ids)
    auxiliary = torch.stack([d.auxiliary for d in decisions.values()]).mean()
    predictors = list(method.predictors.parameters())
    routers = list(method.routers.parameters())
    grads = torch.autograd.grad(auxiliary, [*predictors, *routers], allow_unused=True)
    assert all(g is not None for g in grads[: len(predictors)])
    assert all(g is None for g in grads[len(predictors) :])
    _, first = evaluate(model, method, ids)
    for parameter in routers:
        parameter.data.add_(1.0)
    _, second = evaluate(model, method, ids)
    assert all(torch.equal(first[s].execute_BT, second[s].execute_BT) for s in first)
    with pytest.raises(ValueError, match="predictor"):
        MoD(sparsity=0.2, decision="predictor", output="scaled")


def test_top_share_by_sorting():
    scores = torch.tensor([[0.3, 2.0, -1.0, 0.3, 9.0], [5.0, 4.0, 3.0, 2.0, 1.0]])
    valid = torch.tensor([[True, True, True, True, False], [True] * 5])
    chosen = top_share(scores, valid, 0.5)
    assert chosen.tolist() == [
        [True, True, False, False, False],
        [True, True, False, False, False],
    ]


def test_adapters_are_trained_with_the_routers(model):
    (stage,) = made(model, lora={"rank": 2}).stages(BUDGET)
    assert stage.lora is not None and not stage.hard and stage.parameters
