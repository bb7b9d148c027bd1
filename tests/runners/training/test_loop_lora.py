"""Stages that train adapters, decide hard, or steer the threshold."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch

from methods.base import LoraSpec, StageBudget
from methods.engine.routed import routed
from tests.conftest import token_rows
from tests.runners.toy import toy, toy_loop
from tests.runners.training.test_loop import stage, train, vectors


def lora_stage(method, **options):
    options = {"parameters": [], "lora": LoraSpec(rank=2, dropout=0.0), "lr": 0.02} | options
    return stage(method, hard=True, **options)


def test_lora_stage_trains_the_adapters_alone(tiny_llama):
    before = copy.deepcopy(tiny_llama.state_dict())
    rows = token_rows(2, 16, seed=9)
    method, steps = toy(tiny_llama), []
    loop = toy_loop(
        tiny_llama, method, rows=rows, on_step=lambda name, figures: steps.append(figures)
    )
    start = vectors(method)
    loop.run(lora_stage(method, budget=StageBudget(30, 2, 16)))
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.05
    assert torch.equal(vectors(method), start)
    assert all(torch.equal(v, before[k]) for k, v in tiny_llama.state_dict().items())
    assert any(p.abs().sum() > 0 for p in method.adapter.up.parameters())
    assert not method.training and not method.adapter.training


def test_a_hard_stage_has_the_gradients_of_the_blended_model(tiny_llama, monkeypatch):
    """Its update runs on executed tokens only, and is the one of the masked path."""
    rows = token_rows(2, 16, seed=9)
    method = toy(tiny_llama, sparsity=0.2)
    views = []
    loss = lambda view: views.append(float(view.execute_rate)) or view.task_loss  # noqa: E731
    gradients = []
    step = torch.optim.AdamW.step

    def spied(self, *args, **kwargs):
        # a unit that no token executes leaves its adapter without a gradient
        own = [(p, p.grad) for p in self.param_groups[0]["params"]]
        gradients.append([torch.zeros_like(p) if g is None else g.clone() for p, g in own])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spied)
    options = {"lora": LoraSpec(rank=2, dropout=0.0), "clip_norm": 1e9, "per_target": True}
    loop = toy_loop(tiny_llama, method, rows=rows)
    loop.run(stage(method, hard=True, loss=loss, lr=0.0, **options))
    parameters = [*method.vectors.values(), *method.adapter.parameters()]
    method.requires_grad_(True)
    with routed(tiny_llama, method):
        out = tiny_llama(input_ids=rows, labels=rows)
        rate = 1 - tiny_llama.routing.counters.read().sparsity()
    expected = torch.autograd.grad(out.loss, parameters)
    assert 0.5 < rate < 0.95 and views == pytest.approx([rate] * 4)
    assert len(expected) == len(gradients[0])
    for own, reference in zip(gradients[0], expected, strict=True):
        assert torch.allclose(own, reference, atol=1e-6)
    assert sum(float(g.abs().sum()) for g in expected) > 0.1


def test_parameters_outside_the_stage_get_no_gradient(tiny_llama):
    method, _, _ = train(tiny_llama)
    assert all(p.grad is None and not p.requires_grad for p in method.weights.values())


def test_relative_rates_are_shares_of_each_parameters_size(tiny_llama, monkeypatch):
    rates = []
    step = torch.optim.AdamW.step

    def spied(self, *args, **kwargs):
        rates.append([(g["lr"], g["betas"]) for g in self.param_groups])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spied)
    method = toy(tiny_llama)
    with torch.no_grad():
        method.vectors["1_mlp"].fill_(0.5)
        method.vectors["2_mlp"].zero_()
    loop = toy_loop(tiny_llama, method)
    loop.run(stage(method, lr=0.1, relative_lr=True, betas=(0.8, 0.9)))
    sizes = {key: rate for key, (rate, _) in zip(method.vectors, rates[0], strict=True)}
    assert sizes == pytest.approx({"1_mlp": 0.05, "2_mlp": 1e-4})
    assert {betas for _, betas in rates[0]} == {(0.8, 0.9)}


@pytest.mark.parametrize("hold", [0.0, 0.5])
def test_a_controller_brings_the_realised_sparsity_to_the_target(tiny_llama, hold):
    """Scores that the threshold does not fit yet, and a frozen method."""
    method, steps = toy(tiny_llama, sparsity=0.15), []
    loop = toy_loop(
        tiny_llama,
        method,
        rows=token_rows(4, 16, seed=9),
        on_step=lambda name, figures: steps.append(figures["sparsity"]),
    )
    loop.run(stage(method, budget=StageBudget(40, 4, 16), lr=0.0, hold=hold))
    late = sum(steps[-10:]) / 10
    assert abs(steps[0] - 0.15) > 0.02
    assert (abs(late - 0.15) < 0.02) == (hold > 0)


def test_hard_decisions_approach_their_target_without_a_swing(tiny_llama):
    """Every row the same: the distance shrinks by `hold` a step, and never changes its sign."""
    method, steps = toy(tiny_llama, sparsity=0.15), []
    loop = toy_loop(
        tiny_llama,
        method,
        rows=token_rows(1, 16, seed=9).repeat(64, 1),
        on_step=lambda name, figures: steps.append(figures["sparsity"] - 0.15),
    )
    budget = StageBudget(12, 64, 16)
    loop.run(stage(method, budget=budget, lr=0.0, hold=0.5, hard=True, per_target=True))
    assert abs(steps[0]) > 0.01
    grain = 1 / (16 * 6)
    assert all(abs(after) <= abs(before) + grain for before, after in pairwise(steps))
    assert abs(steps[-1]) <= 2 * grain
