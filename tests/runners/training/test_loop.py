"""Training with a toy method: every rule of the loop against a computation of its own."""

from __future__ import annotations

import copy
import math
import signal

import pytest
import torch

from methods.base import Site, Stage, StageBudget
from methods.engine.routed import routed
from runners.errors import UserError
from runners.training import passes
from runners.training.loop import TrainingDiverged
from tests.conftest import token_rows
from tests.runners.toy import SITES, toy, toy_loop

BUDGET = StageBudget(steps=4, batch_size=2, seq_len=16)


def stage(method, *, budget=BUDGET, **options):
    options.setdefault("loss", lambda view: view.task_loss)
    options.setdefault("parameters", list(method.vectors.values()))
    return Stage("toy", budget=budget, **options)


def train(model, *, seed=0, objective="lm", rows=None, sparsity=0.1, **options):
    """(method, report, figures of each step) after one stage."""
    method = toy(model, sparsity=sparsity)
    steps = []
    loop = toy_loop(
        model,
        method,
        seed=seed,
        objective=objective,
        rows=rows,
        on_step=lambda name, figures: steps.append({"stage": name, **figures}),
    )
    report = loop.run(stage(method, **options))
    return method, report, steps


def vectors(method):
    return torch.cat([vector.detach() for vector in method.vectors.values()])


def test_a_fit_is_called_with_the_probe(tiny_llama):
    method = toy(tiny_llama)
    loop = toy_loop(tiny_llama, method)
    seen = []
    report = loop.run(Stage("fit", fit=lambda probe: seen.append(probe.loss([]))))
    assert len(seen) == 1
    assert (report.steps, report.final_loss, report.name) == (0, None, "fit")
    assert report.tokens == 10 * 16


def test_report_and_curve(tiny_llama):
    _, report, steps = train(tiny_llama, report=lambda probe: {"figure": 1.5})
    assert report.steps == len(steps) == 4
    assert report.tokens == 4 * 2 * 16
    assert report.final_loss == steps[-1]["loss"]
    assert [s["step"] for s in steps] == [1, 2, 3, 4]
    assert {s["stage"] for s in steps} == {"toy"}
    assert report.figures == {"figure": 1.5}
    assert report.seconds > 0
    assert report.peak_memory_bytes > 2**20
    assert report.to_dict()["cached"] is False


@pytest.mark.parametrize("objective", ["lm", "distill"])
def test_first_loss_is_that_of_the_routed_model(tiny_llama, objective):
    rows = token_rows(2, 16, seed=9)
    method, _, steps = train(tiny_llama, objective=objective, rows=rows, lr=0.0)
    dense = tiny_llama(input_ids=rows).logits.log_softmax(-1)
    with torch.no_grad(), routed(tiny_llama, method):
        out = tiny_llama(input_ids=rows, labels=rows)
    own = out.logits.log_softmax(-1)
    kl = float((dense.exp() * (dense - own)).sum(-1).mean())
    expected = {"lm": float(out.loss), "distill": kl}[objective]
    assert steps[0]["loss"] == pytest.approx(expected, rel=1e-4)
    assert kl > 1e-4


def test_accumulation_equals_one_big_batch(tiny_llama):
    small, big = StageBudget(3, 2, 16, accumulate=4), StageBudget(3, 8, 16)
    found = [vectors(train(tiny_llama, budget=b, lr=0.01)[0]) for b in (small, big)]
    assert torch.allclose(*found, atol=1e-5)
    assert not torch.allclose(found[0], vectors(toy(tiny_llama)), atol=1e-3)


@pytest.mark.parametrize("parts", [StageBudget(3, 2, 16, accumulate=4), StageBudget(3, 1, 16, 8)])
def test_accumulation_is_one_big_batch_where_a_penalty_bends(tiny_llama, parts):
    """A mean of penalties on the micro-batches' rates is not the penalty on their mean."""

    def penalised(view):
        bent = (view.execute_rate - 0.9).abs() + sum(r.square() for r in view.site_rates.values())
        return view.task_loss + 8.0 * bent

    found = []
    for budget in (parts, StageBudget(3, 8, 16)):
        method = toy(tiny_llama)
        loop = toy_loop(tiny_llama, method)
        own = list(method.weights.values())
        loop.run(stage(method, budget=budget, lr=0.01, loss=penalised, parameters=own))
        found.append(torch.cat([weight.detach() for weight in own]))
    start = torch.cat([weight.detach() for weight in toy(tiny_llama).weights.values()])
    assert torch.allclose(*found, atol=1e-5)
    assert not torch.allclose(found[0], start, atol=1e-3)


@pytest.mark.parametrize(("penalised", "forwards"), [(False, 1 + 4), (True, 4 + 4)])
def test_a_loss_without_rates_is_not_paid_for_twice(tiny_llama, penalised, forwards):
    seen = []
    tiny_llama.model.register_forward_hook(lambda *_: seen.append(1))

    def loss(view):
        return view.task_loss + (view.execute_rate - 1).square() if penalised else view.task_loss

    train(tiny_llama, budget=StageBudget(1, 2, 16, accumulate=4), loss=loss, sparsity=0.0)
    assert len(seen) == forwards


def spy_optimiser(monkeypatch):
    """Gradient norm and learning rate as each optimiser step sees them."""
    seen = []
    step = torch.optim.AdamW.step

    def spied(self, *args, **kwargs):
        group = self.param_groups[0]
        norms = [p.grad.norm() for p in group["params"]]
        seen.append((float(torch.stack(norms).norm()), group["lr"], group["weight_decay"]))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spied)
    return seen


def test_clipping(tiny_llama, monkeypatch):
    seen = spy_optimiser(monkeypatch)
    train(tiny_llama, clip_norm=1e9, lr=0.0)
    free = [norm for norm, _, _ in seen]
    seen.clear()
    bound = min(free) / 2
    train(tiny_llama, clip_norm=bound, lr=0.0)
    assert [norm for norm, _, _ in seen] == pytest.approx([bound] * 4, rel=1e-3)


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0.0, [1.0] * 8),
        ("constant", 0.5, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("cosine", 0.0, [(1 + math.cos(math.pi * i / 8)) / 2 for i in range(8)]),
        ("cosine", 0.25, [0.5, 1.0, *((1 + math.cos(math.pi * i / 6)) / 2 for i in range(6))]),
    ],
)
def test_schedule(tiny_llama, monkeypatch, schedule, warmup, expected):
    seen = spy_optimiser(monkeypatch)
    options = {"schedule": schedule, "warmup": warmup, "lr": 0.02, "weight_decay": 0.3}
    train(tiny_llama, budget=StageBudget(8, 2, 16), **options)
    assert [lr for _, lr, _ in seen] == pytest.approx([0.02 * share for share in expected])
    assert {decay for _, _, decay in seen} == {0.3}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_divergence_is_one_clear_line(tiny_llama, bad):
    calls = []

    def loss(view):
        calls.append(view)
        return view.task_loss * (bad if len(calls) == 3 else 1.0)

    with pytest.raises(TrainingDiverged, match=r"toy: loss is .* at step 3 of 4; lower") as caught:
        train(tiny_llama, loss=loss, lr=0.25)
    assert "0.25" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not hasattr(tiny_llama, "routing")


def test_rows_are_used_once_an_epoch_and_have_no_padding(tiny_llama):
    rows = token_rows(8, 16, seed=9)
    batches = []
    tiny_llama.model.register_forward_pre_hook(
        lambda _, args, kwargs: batches.append(kwargs), with_kwargs=True
    )
    train(tiny_llama, rows=rows, budget=StageBudget(8, 2, 16))
    assert all(kwargs.get("attention_mask") is None for kwargs in batches)
    seen = [tuple(row) for kwargs in batches for row in kwargs["input_ids"].tolist()]
    expected = sorted(map(tuple, rows.tolist()))
    assert sorted(seen[:8]) == sorted(seen[8:]) == expected
    assert seen[:8] != seen[8:]


def test_only_the_stages_parameters_move(tiny_llama):
    before = copy.deepcopy(tiny_llama.state_dict())
    start = toy(tiny_llama)
    method, _, _ = train(tiny_llama, lr=0.05)
    for key in method.weights:
        assert torch.equal(method.weights[key], start.weights[key])
        assert not torch.equal(method.vectors[key], start.vectors[key])
    assert all(torch.equal(v, before[k]) for k, v in tiny_llama.state_dict().items())
    assert not method.training


def test_lower_loss(tiny_llama):
    rows = token_rows(2, 16, seed=9)
    _, _, steps = train(tiny_llama, rows=rows, lr=0.05, budget=StageBudget(30, 2, 16))
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.05


def test_dense_stage_regresses_on_each_units_output(tiny_llama):
    """Fitting a vector to a unit's outputs by squared error finds their mean."""
    rows = token_rows(8, 16, seed=9)
    outputs = []
    tiny_llama.model.layers[1].mlp.register_forward_hook(
        lambda _, __, out: outputs.append(out.flatten(0, 1)) and None
    )
    tiny_llama(input_ids=rows)
    mean = outputs[0].mean(0)

    method = toy(tiny_llama)

    def loss(view):
        error = (view.y_ND - method.vectors["1_mlp"]).square().mean()
        return error if view.site == Site(1, "mlp") else error * 0.0

    options = {"forward": "dense", "budget": StageBudget(300, 8, 16), "weight_decay": 0.0}
    report = toy_loop(tiny_llama, method, rows=rows).run(
        stage(method, loss=loss, lr=0.02, **options)
    )
    assert torch.allclose(method.vectors["1_mlp"], mean, atol=0.02)
    left = float(outputs[0].var(0, correction=0).mean())
    assert report.final_loss == pytest.approx(left, rel=0.02)


def test_view_and_targets(tiny_llama):
    views = []

    def loss(view):
        views.append((view.sparsity, float(view.execute_rate.detach()), set(view.site_rates)))
        return view.task_loss

    targets = (0.05, 0.1, 0.2)
    options = {"targets": targets, "lr": 0.0}
    _, _, steps = train(tiny_llama, loss=loss, budget=StageBudget(6, 2, 16), **options)
    asked = [target for target, _, _ in views]
    assert sorted(asked[:3]) == sorted(asked[3:]) == sorted(targets)
    assert [s["target"] for s in steps] == asked
    for target, rate, sites in views:
        assert sites == set(SITES)
        assert 1 - rate == pytest.approx(target, abs=0.08)
    assert [s["sparsity"] for s in steps] == pytest.approx([1 - rate for _, rate, _ in views])


def test_targets_that_share_their_text_ask_the_dense_model_once(tiny_llama, monkeypatch):
    """Three targets: two rounds of steps, each on rows of its own."""
    read, dense = [], []
    routed_too = passes.distillation_loss
    states = passes.hidden_states

    def task(model, ids, teacher, positions):
        read.append(ids[:, 0].tolist())
        assert torch.equal(teacher, expected(ids)), "the dense model's states of these rows"
        return routed_too(model, ids, teacher, positions)

    def asked(model, ids):
        dense.append(ids[:, 0].tolist())
        return states(model, ids)

    def expected(ids):
        with tiny_llama.routing.dense(), torch.no_grad():
            return states(tiny_llama, ids)

    monkeypatch.setattr(passes, "distillation_loss", task)
    monkeypatch.setattr(passes, "hidden_states", asked)
    options = {"targets": (0.05, 0.1, 0.2), "share_text": True, "objective": "distill"}
    train(tiny_llama, budget=StageBudget(6, 2, 16), hard=True, rows=token_rows(12, 16), **options)
    assert read == [read[0]] * 3 + [read[3]] * 3 and read[0] != read[3]
    assert dense == [read[0], read[3]]


def test_a_stage_repeats_whatever_ran_before(tiny_llama):
    first = train(tiny_llama, lr=0.02)
    torch.rand(1000)
    second = train(tiny_llama, lr=0.02)
    other = train(tiny_llama, lr=0.02, seed=1)
    assert torch.equal(vectors(first[0]), vectors(second[0]))
    assert [s["loss"] for s in first[2]] == [s["loss"] for s in second[2]]
    assert not torch.equal(vectors(first[0]), vectors(other[0]))


def test_text_for_less_than_a_batch_is_one_clear_line(tiny_llama):
    """Not an endless search for a whole batch."""

    def too_long(*_):
        raise TimeoutError("the loop never got a batch")

    signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, 3.0)
    try:
        with pytest.raises(UserError, match="batch"):
            train(tiny_llama, rows=token_rows(1, 16))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
