"""HeRo against its recurrence over depth, token by token, on a small model."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from methods.base import Site
from methods.engine.routed import attach, routed
from methods.hero import HeRo
from tests.methods.by_hand import BUDGET, ByHand, cross_entropy, evaluate, train_forward
from tests.methods.conftest import small_ids, small_model

LAYERS = 5


@pytest.fixture
def model():
    return small_model(layers=LAYERS)


def made(model, **options):
    torch.manual_seed(6)
    method = attach(model, HeRo(sparsity=0.25, adapter_width=6, **options)).eval()
    method.threshold.fill_(0.0)
    return method


class Walk:
    """One token's history, as lists over the routed layers that it passed."""

    def __init__(self, method):
        self.m = method.history
        self.h, self.steps, self.scores, self.keys, self.values, self.ages = ([] for _ in range(6))

    def logit(self, layer, h):
        m = self.m
        step = h - self.h[-1] if self.h else None
        turn = 0.0
        if len(self.steps) and step is not None and self.steps[-1] is not None:
            turn = float(functional.cosine_similarity(step, self.steps[-1], dim=0))
        features = torch.tensor(
            [
                (layer + 1) / LAYERS,
                1 - (layer + 1) / LAYERS,
                0.0 if step is None else float(step.norm() / h.norm()),
                turn,
                self.scores[-1] if self.scores else 1.0,
                math.prod(self.scores),
            ]
        )
        state = functional.silu(m.state(h / (h.square().mean() + 1e-6).sqrt()))
        encoded = torch.cat([state, functional.silu(m.path(features))])
        q, k = (functional.elu(f(encoded)) + 1 for f in (m.query, m.key))
        context = torch.zeros_like(encoded)
        if self.keys:
            weights = [float(q @ key) * age for key, age in zip(self.keys, self.ages, strict=True)]
            context = sum(w * v for w, v in zip(weights, self.values, strict=True)) / sum(weights)
        novelty = 1 - functional.cosine_similarity(encoded, context, dim=0)
        logit = m.head(torch.cat([encoded, context, novelty[None]]))[0]
        keep = float(torch.sigmoid(m.forget[layer]))
        self.ages = [age * keep for age in self.ages] + [1.0]
        self.keys.append(k)
        self.values.append(m.value(encoded))
        self.h.append(h)
        self.steps.append(step)
        self.scores.append(float(torch.sigmoid(logit)))
        return float(logit)


def by_hand(model, method, walks):
    def rule(index, layer, h, run):
        h = h + run.attention(layer, h)
        site = Site(index, "mlp")
        if site not in method.sites():
            return h + run.mlp(layer, h)
        head = method.routers.modules_by_site[site.key].head
        local = (h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt()) @ head.weight[0] + head.bias
        history = torch.tensor(
            [[walks[b][t].logit(index, h[b, t]) for t in range(h.shape[1])] for b in range(len(h))]
        )
        g = torch.sigmoid(local + history - method.threshold)[..., None]
        adapter = method.adapters.modules_by_site[site.key]
        x = layer.post_attention_layernorm(h)
        bypass = adapter.up(functional.silu(adapter.into(x)))
        return h + torch.where(g > 0.5, g * layer.mlp(x), (1 - g) * bypass)

    return ByHand(model, rule)


def test_inference_is_the_recurrence(model):
    method, ids = made(model), small_ids(2, 7)
    own, decisions = evaluate(model, method, ids)
    scores = torch.stack([d.scores_BT for d in decisions.values()])
    method.threshold.fill_(float(scores.median()))
    own, decisions = evaluate(model, method, ids)
    walks = [[Walk(method) for _ in range(7)] for _ in range(2)]
    with torch.no_grad():
        reference = by_hand(model, method, walks)(ids)
    assert torch.allclose(own, reference, atol=2e-5)
    assert 0.1 < torch.stack([d.execute_BT for d in decisions.values()]).float().mean() < 0.9
    assert len(decisions) == len(walks[0][0].h) == len(method.sites()) == 3


def test_the_memory_changes_the_score(model):
    """The same residual stream, with and without the layers before."""
    method, h = made(model), torch.randn(1, 3, 32)
    _, path = method.history(2, torch.randn(1, 3, 32), None)
    fresh, _ = method.history(3, h, None)
    remembered, _ = method.history(3, h, path)
    assert not torch.allclose(fresh, remembered, atol=1e-3)


def test_nothing_is_kept_between_forwards(model):
    method, first, second = made(model), small_ids(2, 9), small_ids(1, 5, seed=7)
    alone, _ = evaluate(model, method, second)
    evaluate(model, method, first)
    assert torch.equal(evaluate(model, method, second)[0], alone)


def test_an_interrupted_forward_leaves_nothing_behind(model):
    method, ids = made(model), small_ids(1, 5)
    alone, _ = evaluate(model, method, ids)
    hook = model.model.layers[3].self_attn.register_forward_pre_hook(
        lambda *_: (_ for _ in ()).throw(RuntimeError("stop"))
    )
    with pytest.raises(RuntimeError, match="stop"), routed(model, method):
        model(input_ids=small_ids(2, 6))
    hook.remove()
    assert torch.equal(evaluate(model, method, ids)[0], alone)


def test_every_part_gets_a_gradient(model):
    method, ids = made(model), small_ids(2, 9)
    logits, _ = train_forward(model, method, ids)
    loss = cross_entropy(logits, ids)
    parameters = dict(method.named_parameters())
    grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    for name, gradient in zip(parameters, grads, strict=True):
        assert gradient is not None and gradient.isfinite().all(), name
        if name != "history.forget":
            assert gradient.abs().sum() > 0, name
    routed_layers = [site.layer for site in method.sites()]
    moved = grads[list(parameters).index("history.forget")]
    assert moved[routed_layers[1] : routed_layers[-1]].abs().sum() > 0
    (stage,) = method.stages(BUDGET)
    assert {id(p) for p in stage.parameters} == {id(p) for p in method.parameters()}


@pytest.mark.parametrize("sparsity, first", [(0.1, 15), (0.25, 13), (0.4, 3)])
def test_the_latter_half_widens_with_the_target(model, sparsity, first):
    method = HeRo(sparsity=sparsity)
    method.shape = made(model).shape.__class__(30, 32, 4, 2, 12, 48, 61)
    assert [site.layer for site in method.sites()] == list(range(first, 30))
    assert method.reach() > sparsity
