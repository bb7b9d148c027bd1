"""Within a stage: a checkpoint gives the same numbers, damage is noticed, memory that lacks too."""

from __future__ import annotations

import pytest
import torch

from methods.base import Stage, StageBudget
from runners.errors import UserError
from runners.training.passes import Passes
from runners.training.state import Checkpoint
from tests.runners.toy import toy, toy_loop

BUDGET = StageBudget(steps=6, batch_size=4, seq_len=16, accumulate=2)


def train(model, saved=None, *, stop_at=None, hold=0.1):
    """(trained vectors, losses, report) of a toy stage; stopped by an error after a step."""
    method, losses = toy(model), []

    def on_step(_, figures):
        losses.append(figures["loss"])
        if figures["step"] == stop_at:
            raise KeyboardInterrupt

    loss = lambda view: view.task_loss + 8.0 * (0.9 - view.execute_rate).abs()  # noqa: E731
    parameters = [*method.vectors.values(), *method.weights.values()]
    stage = Stage("toy", loss=loss, parameters=parameters, budget=BUDGET, lr=0.02, hold=hold)
    loop = toy_loop(model, method, on_step=on_step)
    try:
        report = loop.run(stage, saved)
    except KeyboardInterrupt:
        report = None
    return torch.cat([p.detach() for p in parameters]), losses, report


def test_a_stage_goes_on_to_the_same_bits(tiny_llama, tmp_path):
    whole, losses, _ = train(tiny_llama)
    train(tiny_llama, Checkpoint(tmp_path / "x.checkpoint", 0.0), stop_at=4)
    torch.rand(99)
    resumed, rest, report = train(tiny_llama, Checkpoint(tmp_path / "x.checkpoint", 0.0))
    assert torch.equal(resumed, whole)
    assert rest == losses[3:]
    assert report.steps == 6


@pytest.mark.parametrize("cut", [0, 7, 900, -1])
def test_a_torn_checkpoint_is_no_checkpoint(tiny_llama, tmp_path, cut):
    whole, losses, _ = train(tiny_llama)
    file = tmp_path / "x.checkpoint"
    train(tiny_llama, Checkpoint(file, 0.0), stop_at=4)
    file.write_bytes(file.read_bytes()[:cut])
    resumed, rest, _ = train(tiny_llama, Checkpoint(file, 0.0))
    assert torch.equal(resumed, whole)
    assert rest == losses


def limited(monkeypatch, rows):
    view = Passes._view

    def fails(self, stage, batch, *args, **options):
        if len(batch) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return view(self, stage, batch, *args, **options)

    monkeypatch.setattr(Passes, "_view", fails)


def test_half_the_batch_is_the_same_step(tiny_llama, monkeypatch):
    whole, losses, _ = train(tiny_llama)
    limited(monkeypatch, 1)
    parts, own, report = train(tiny_llama)
    assert (report.micro_batch, report.oom_halvings) == (1, 2)
    assert own == pytest.approx(losses, rel=1e-5)
    assert torch.allclose(parts, whole, atol=1e-4)


def test_a_row_that_does_not_fit_is_one_line(tiny_llama, monkeypatch):
    limited(monkeypatch, 0)
    with pytest.raises(UserError, match="one row of 16 tokens"):
        train(tiny_llama)
