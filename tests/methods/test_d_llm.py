"""D-LLM against its equations, on a small model."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from methods.base import Decision, RoutedView, Site
from methods.d_llm import DLLM
from methods.engine.routed import attach, routed
from tests.methods.by_hand import BUDGET, ByHand, context, evaluate
from tests.methods.conftest import small_ids, small_model

LAYERS = 4


@pytest.fixture
def model():
    return small_model(layers=LAYERS)


def made(model, **options):
    torch.manual_seed(3)
    method = attach(model, DLLM(sparsity=0.3, router_width=6, **options)).eval()
    method.threshold.fill_(1.9)
    return method


def logits_by_hand(method, site, h):
    """Linear -> RMSNorm -> SiLU -> Linear, logits (bypass, execute)."""
    router = method.routers.modules_by_site[site.key]
    z = h @ router.down.weight.T + router.down.bias
    z = router.norm.weight * z / (z.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return functional.linear(z * torch.sigmoid(z), router.head.weight, router.head.bias)


def test_routers_start_with_the_published_bias(model):
    for site in (method := made(model)).sites():
        bias = method.routers.modules_by_site[site.key].head.bias
        assert torch.allclose(bias, torch.tensor([0.1, 2.0]))
    assert list(method.sites()) == [Site(2, "block"), Site(3, "block")]


def test_skipped_tokens_leave_no_key_and_the_first_two_never_skip(model):
    method, ids = made(model), small_ids(3, 10)

    def rule(index, layer, h, run):
        site = Site(index, "block")
        if site not in method.sites():
            return run.block(layer, h)
        bypass, execute = logits_by_hand(method, site, h).unbind(-1)
        chosen = execute - bypass > method.threshold
        chosen[:, :2] = True
        return torch.where(chosen[..., None], run.block(layer, h, chosen), h)

    own, decisions = evaluate(model, method, ids)
    with torch.no_grad():
        assert torch.allclose(own, ByHand(model, rule)(ids), atol=1e-5)
    for decision in decisions.values():
        assert decision.execute_BT[:, :2].all()
        assert 0 < decision.execute_BT[:, 2:].float().mean() < 1


def test_a_second_prompt_does_not_see_the_first_one(model):
    """The published cache mask is never reset."""
    method, first, second = made(model), small_ids(1, 9), small_ids(1, 6, seed=8)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with routed(model, method):
        alone = model.generate(second, **options)
        model.generate(first, **options)
        assert torch.equal(model.generate(second, **options), alone)


def test_training_samples_the_softmax_of_the_pair(model):
    method = made(model)
    method.threshold.fill_(0.0)
    h = torch.randn(1, 3, 32).repeat(4000, 1, 1)
    decision = method.route(Site(2, "block"), h, context(h, training=True))
    expected = logits_by_hand(method, Site(2, "block"), h[0]).softmax(-1)[2, 1]
    assert float(decision.gate_BT[:, 2].detach().mean()) == pytest.approx(
        float(expected.detach()), abs=0.03
    )
    decision.gate_BT.sum().backward()
    assert all(p.grad.isfinite().all() for p in method.routers.parameters() if p.grad is not None)


@pytest.mark.parametrize("anneal", [0.0, 0.3, 1.0])
def test_the_penalty_is_the_l1_of_each_tokens_depth(model, anneal):
    method = made(model)
    gates = torch.tensor([[1, 1, 1, 0, 1], [1, 1, 0, 0, 1]]).float()
    decisions = {
        site: Decision(gate.bool()[None], gate[None], gate[None])
        for site, gate in zip(method.sites(), gates, strict=True)
    }
    valid = torch.tensor([[True, True, True, True, False]])
    view = RoutedView(
        torch.tensor(2.0), torch.tensor(0.5), {}, torch.zeros(()), 0.3, decisions, valid, anneal
    )
    depths = [(1 + 1 + 1 + 0) / LAYERS, (1 + 1 + 0 + 0) / LAYERS]
    l1 = sum(abs(depth - 0.7) for depth in depths) / 2
    weight = 5.0 * math.sin(anneal * math.pi / 2)
    assert float(method._routed_loss(view)) == pytest.approx(2.0 + weight * l1, abs=1e-6)


def test_adapters_are_trained_with_the_routers(model):
    (stage,) = made(model, lora={"rank": 2, "targets": ["q", "k", "v"]}).stages(BUDGET)
    assert stage.lora is not None and not stage.hard and stage.parameters
