"""GateSkip against its equations, on a small model."""

from __future__ import annotations

import pytest
import torch

from methods.base import RoutedView, Site
from methods.engine.routed import attach, routed
from methods.gateskip import GateSkip
from runners.corpus.rows import ProbeText
from runners.training.probe import ModelProbe
from tests.methods.by_hand import ByHand, cross_entropy, evaluate, train_forward
from tests.methods.conftest import small_ids, small_model

TEXT = ProbeText(
    train=small_ids(128, 16, seed=1),
    calibration=small_ids(24, 16, seed=2),
    sensitivity=small_ids(2, 16),
)


@pytest.fixture
def model():
    return small_model(layers=3)


def made(model, **options):
    torch.manual_seed(4)
    method = GateSkip(sparsity=0.4, **options)
    method.reserve = 0
    return attach(model, method).eval()


def by_hand(model, method, executes):
    """h + g o, g = sigmoid(W x + b), where `executes(site, mean gate)`; h elsewhere."""

    def branch(site, x, added):
        head = method.routers.at(site).head
        g = torch.sigmoid((x @ head.weight.T + head.bias).double())
        return torch.where(executes(site, g.mean(-1))[..., None], g.to(x.dtype) * added, 0.0)

    def rule(index, layer, h, run):
        h = h + branch(Site(index, "attention"), layer.input_layernorm(h), run.attention(layer, h))
        return h + branch(Site(index, "mlp"), layer.post_attention_layernorm(h), run.mlp(layer, h))

    return ByHand(model, rule)


@pytest.mark.parametrize("gate", ["scalar", "vector"])
def test_executed_tokens_are_scaled_and_others_skip(model, gate):
    method, ids = made(model, gate=gate), small_ids(3, 10)
    method.calibrate(ModelProbe(model, method, TEXT), 0.4)
    own, decisions = evaluate(model, method, ids)
    executed = by_hand(model, method, lambda site, g: decisions[site].execute_BT)
    assert torch.allclose(own, executed(ids), atol=1e-4)
    with torch.no_grad(), routed(model, method, "gathered"):
        assert torch.allclose(model(input_ids=ids).logits, own, atol=1e-4)
    rate = torch.stack([d.execute_BT for d in decisions.values()]).float().mean()
    assert 0.3 < rate < 0.9


@pytest.mark.parametrize("gate", ["scalar", "vector"])
def test_in_training_the_lowest_mean_gates_of_a_sequence_skip(model, gate):
    """At the last step the whole target; the gradient is that of the executed tokens."""
    method, ids = made(model, gate=gate), small_ids(2, 10)

    def lowest(site, mean_gate):
        place = mean_gate.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        return place < 6  # of 10 tokens

    own, _ = train_forward(model, method, ids, target=0.4, anneal=1.0)
    wanted = by_hand(model, method, lowest)(ids)
    assert torch.allclose(own, wanted, atol=1e-4)
    parameters = list(method.routers.parameters())
    got = torch.autograd.grad(cross_entropy(own, ids), parameters)
    expected = torch.autograd.grad(cross_entropy(wanted, ids), parameters)
    assert sum(float(g.abs().sum()) for g in expected) > 1e-3
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, expected, strict=True))


def test_the_skipped_share_rises_to_the_target_and_stays(model):
    method, ids = made(model, ramp=0.5), small_ids(2, 10)
    shares = []
    for anneal in (0.0, 0.25, 0.5, 1.0):
        _, decisions = train_forward(model, method, ids, target=0.4, anneal=anneal)
        executed = torch.stack([d.execute_BT for d in decisions.values()]).float()
        shares.append(float(1 - executed.mean()))
    assert shares == pytest.approx([0.0, 0.2, 0.4, 0.4])


def test_each_unit_skips_the_target_of_calibration_text(model):
    """One threshold, and yet per-layer quantiles: of the routed model, not of the dense one."""
    method = made(model)
    probe = ModelProbe(model, method, TEXT)
    method.calibrate(probe, 0.4)
    _, decisions = evaluate(model, method, TEXT.calibration)
    skipped = [float(1 - d.execute_BT.float().mean()) for d in decisions.values()]
    assert skipped == pytest.approx([0.4] * 6, abs=0.03)
    raw = [d.scores_BT.std() for d in decisions.values()]
    assert max(raw) < 1.5 * min(raw)  # ranks, whatever the spread of the unit's gates


def test_rank_is_the_share_of_calibration_scores_below(model):
    gate = made(model).routers.at(Site(0, "mlp"))
    known = torch.randn(4001, generator=torch.Generator().manual_seed(3))
    gate.set_quantiles(known)
    asked = torch.linspace(-2.5, 2.5, 50)
    share = (known[None] < asked[:, None]).float().mean(1)
    assert torch.allclose(gate.rank(asked), share, atol=0.005)
    beyond = gate.rank(torch.tensor([-30.0, -20.0, 20.0, 30.0]))
    assert beyond[0] < beyond[1] < 0.0 and 1.0 < beyond[2] < beyond[3]


def test_the_loss_adds_the_mean_gate(model):
    method, ids = made(model, gate_weight=0.5), small_ids(1, 6)
    _, decisions = train_forward(model, method, ids, target=0.4)
    view = RoutedView(
        torch.tensor(2.0),
        torch.tensor(0.5),
        {},
        torch.zeros(()),
        0.4,
        decisions,
        torch.tensor([[True] * 4 + [False] * 2]),
    )
    gates = torch.stack([d.scale_BT[:, :4] for d in decisions.values()])
    assert method._routed_loss(view).item() == pytest.approx(
        2.0 + 0.5 * float(gates.mean().detach())
    )
