"""Losses and gradients against a computation by hand on full logits."""

from __future__ import annotations

import math

import pytest
import torch

from runners.training import losses
from runners.training.losses import distillation_loss, hidden_states, language_model_loss
from tests.conftest import token_rows


@pytest.fixture
def teacher_BTD(tiny_llama):
    """Final hidden states of a dense model that is not quite the routed one."""
    clean = hidden_states(tiny_llama, token_rows(3, 20)).detach()
    return clean + 0.3 * torch.randn_like(clean)


def cross_entropy_by_hand(logits_BTV, ids_BT):
    total = 0.0
    for row, ids in zip(logits_BTV.double(), ids_BT.tolist(), strict=True):
        for position, target in enumerate(ids[1:]):
            scores = row[position].tolist()
            total -= scores[target] - math.log(sum(math.exp(s) for s in scores))
    return total / (ids_BT.shape[0] * (ids_BT.shape[1] - 1))


def kl_by_hand(teacher_BTV, student_BTV):
    p, q = teacher_BTV.double().softmax(-1), student_BTV.double().softmax(-1)
    return float((p * (p / q).log()).sum(-1).mean())


@pytest.mark.parametrize("chunk", [7, 512])
def test_cross_entropy(tiny_llama, monkeypatch, chunk):
    monkeypatch.setattr(losses, "CHUNK_TOKENS", chunk)
    ids = token_rows(3, 20)
    expected = cross_entropy_by_hand(tiny_llama(input_ids=ids).logits, ids)
    assert float(language_model_loss(tiny_llama, ids)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("chunk", [7, 512])
def test_kl_is_of_the_dense_from_the_routed(tiny_llama, teacher_BTD, monkeypatch, chunk):
    monkeypatch.setattr(losses, "CHUNK_TOKENS", chunk)
    ids = token_rows(3, 20)
    dense, routed = tiny_llama.lm_head(teacher_BTD), tiny_llama(input_ids=ids).logits
    found = float(distillation_loss(tiny_llama, ids, teacher_BTD))
    assert found == pytest.approx(kl_by_hand(dense, routed), rel=1e-4)
    assert found != pytest.approx(kl_by_hand(routed, dense), rel=1e-3)


def test_kl_to_itself_is_zero(tiny_llama):
    ids = token_rows(2, 12)
    same = hidden_states(tiny_llama, ids).detach()
    assert float(distillation_loss(tiny_llama, ids, same)) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("objective", ["lm", "distill"])
def test_gradient_survives_chunks(tiny_llama, teacher_BTD, monkeypatch, objective):
    """Recomputing logits in backward gives the gradient of the loss on whole logits."""
    monkeypatch.setattr(losses, "CHUNK_TOKENS", 7)
    ids = token_rows(3, 20)
    weight = tiny_llama.model.layers[1].mlp.down_proj.weight.requires_grad_(True)
    if objective == "lm":
        found = language_model_loss(tiny_llama, ids)
        logits = tiny_llama(input_ids=ids).logits[:, :-1].flatten(0, 1)
        whole = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
    else:
        found = distillation_loss(tiny_llama, ids, teacher_BTD)
        p = tiny_llama.lm_head(teacher_BTD).softmax(-1)
        q = tiny_llama(input_ids=ids).logits.softmax(-1)
        whole = (p * (p.log() - q.log())).sum(-1).mean()
    expected = torch.autograd.grad(whole, weight)[0]
    assert torch.allclose(torch.autograd.grad(found, weight)[0], expected, atol=1e-6)
    assert expected.abs().max() > 1e-4


def test_teacher_gets_no_gradient(tiny_llama, teacher_BTD):
    teacher = teacher_BTD.requires_grad_(True)
    tiny_llama.model.norm.weight.requires_grad_(True)
    distillation_loss(tiny_llama, token_rows(3, 20), teacher).backward()
    assert teacher.grad is None
    assert tiny_llama.model.norm.weight.grad is not None


def test_some_positions_stand_for_all(tiny_llama, teacher_BTD):
    """Every token has the same chance: the mean over many draws is the loss of all."""
    ids = token_rows(3, 20)
    with torch.no_grad():
        whole = float(distillation_loss(tiny_llama, ids, teacher_BTD))
        drawn = [float(distillation_loss(tiny_llama, ids, teacher_BTD, 0.1)) for _ in range(200)]
    error = torch.tensor(drawn).std().item() / len(drawn) ** 0.5
    assert len(set(drawn)) > 100
    assert abs(sum(drawn) / len(drawn) - whole) < 4 * error
