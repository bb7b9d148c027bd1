"""Runs the stages of a recipe. Knows no method: a stage says what to fit or which loss to lower."""

from __future__ import annotations

import hashlib
import logging
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from methods.base import Method, Probe, Stage, StageBudget
from methods.engine.decoder.placement import input_device
from methods.engine.lora import attach_lora
from runners.runtime.distributed import (
    all_reduce,
    all_reduce_max,
    broadcast_object,
    is_distributed,
    most_local_rows,
    shared_gradients,
)
from runners.runtime.memory import out_of_memory
from runners.runtime.progress import progress
from runners.runtime.signals import Stop, deferred
from runners.training.batches import Batches
from runners.training.checkpoints import Checkpoints
from runners.training.cost import Meter
from runners.training.optimizer import TrainingDiverged as TrainingDiverged
from runners.training.optimizer import finite, optimiser
from runners.training.passes import Objective, Passes
from runners.training.state import Position, Training

log = logging.getLogger(__name__)

START_SHARE = 0.125
"""Of the calibration text, for the thresholds at which a gradient stage begins; the point's own is
calibrated after it, on all of it."""

OnStep = Callable[[str, dict[str, float]], None]
OnStart = Callable[[str, int, list[dict[str, float]]], None]


@dataclass
class StageReport:
    """What one stage cost and reached."""

    name: str
    seconds: float
    tokens: int
    peak_memory_bytes: int
    steps: int = 0
    final_loss: float | None = None
    micro_batch: int | None = None
    """Rows of a training pass; fewer than the budget's where memory did not suffice."""
    oom_halvings: int = 0
    figures: dict[str, float] = field(default_factory=dict)
    cached: bool = False

    def to_dict(self) -> dict[str, Any]:
        """JSON form, as in the result record."""
        return asdict(self)


class Loop:
    """Trainer of one method on one model.

    Args:
        model: untouched and frozen.
        method: attached to the model.
        probe: for fits and calibration.
        rows: gives at least so many tokens of training text as int64 rows [n, seq_len].
        objective: `lm` cross-entropy, or `distill`, the KL to the dense model's distributions.
        seed: every stage starts from (seed, stage name), so a resumed recipe repeats exactly.
        on_step: called with (stage name, figures of the step).
        on_start: called with (stage name, steps that an earlier process has done, their figures)
            before the first.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        method: Method,
        probe: Probe,
        rows: Callable[[StageBudget], Tensor],
        *,
        objective: Objective,
        seed: int,
        on_step: OnStep = lambda stage, figures: None,
        on_start: OnStart = lambda stage, steps, curve: None,
    ) -> None:
        self.model, self.method, self.probe, self.rows = model, method, probe, rows
        self.passes, self.seed = Passes(model, method, objective), seed
        self.on_step, self.on_start = on_step, on_start
        self.device = input_device(model)

    def run(self, stage: Stage, saved: Checkpoints | None = None) -> StageReport:
        """Run one stage; the method's modules are changed in place.

        Args:
            saved: where a gradient stage keeps its checkpoints, and goes on from the last.

        Raises:
            TrainingDiverged: the loss is not finite.
            OutOfReach: the method cannot bypass as much as the target.
            UserError: memory does not suffice.
            Interrupted: a signal asked for the end; the checkpoint is written.
        """
        self._seed(stage.name)
        meter = Meter(self.device, self.probe)
        at, trained_tokens = None, 0
        if stage.fit is not None:
            stage.fit(self.probe)
        else:
            assert stage.budget is not None and stage.loss is not None, stage.name
            at = self._train(stage, stage.budget, meter, saved or Checkpoints())
            trained_tokens = stage.budget.tokens
        cost = meter.read()
        cost["tokens"] += trained_tokens
        figures = stage.report(self.probe) if stage.report else {}
        log.info(
            "stage %s: %.1f s, %d tokens %s",
            stage.name,
            cost["seconds"],
            cost["tokens"],
            _short(figures),
        )
        report = StageReport(stage.name, **cost, figures=figures)
        if at is not None:
            report.steps, report.final_loss = at.step, at.loss
            report.micro_batch, report.oom_halvings = at.micro_batch, at.oom_halvings
        return report

    def _train(
        self, stage: Stage, budget: StageBudget, meter: Meter, saved: Checkpoints
    ) -> Position:
        found = broadcast_object(saved.load)
        thresholds = self._start_thresholds(stage) if found is None else {}
        parameters = self._trainable(stage)
        adamw, schedule = optimiser(stage, parameters, budget)
        batches = Batches(self.rows(budget), budget, self.device)
        start = Position(thresholds, most_local_rows(budget.batch_size))
        training = Training(self.method, parameters, adamw, schedule, batches, start)
        if found is not None:
            training.restore(found)
            meter.carry(found.state["cost"])
            log.info("stage %s goes on after step %d of %d", stage.name, found.step, budget.steps)
        at = training.at
        curve = [] if found is None else list(found.state["curve"])
        self.on_start(stage.name, at.step, curve)
        self.method.train()
        bar = progress(range(budget.steps), stage.name, initial=at.step)
        with deferred() as stop:
            while True:
                training.begin_step()
                stop.number = all_reduce_max(stop.number or 0) or None
                if stop.number or (at.step < budget.steps and saved.due()):
                    state = training.state() | {"cost": meter.read(), "curve": curve}
                    saved.save(at.step, training.tensors(), state)
                    stop.obey()
                if at.step == budget.steps:
                    break
                figures = self._step(stage, budget, training, stop)
                if figures is not None:
                    bar.update()
                    bar.set_postfix({k: f"{v:.4g}" for k, v in figures.items() if k != "step"})
                    curve.append(figures)
                    self.on_step(stage.name, figures)
        self.method.eval()
        return at

    def _step(
        self, stage: Stage, budget: StageBudget, training: Training, stop: Stop
    ) -> dict[str, float] | None:
        """One optimiser step and its figures; None if it was given up and has to begin again."""
        at, began = training.at, time.perf_counter()
        target = self._next_target(at.thresholds, at.step)
        found, lacking = None, False
        try:
            found = self._gradients(stage, budget, training, target, stop)
        except Exception as error:
            lacking = out_of_memory(error) and not is_distributed()
            if not lacking:
                raise
        if found is None:
            training.halve(stage.name) if lacking else training.rewind()
            return None
        loss, rate = found
        norm = nn.utils.clip_grad_norm_(training.parameters, stage.clip_norm)
        at.loss = finite(stage, at.step, budget.steps, loss, norm)
        training.adamw.step()
        training.schedule.step()
        training.adamw.zero_grad(set_to_none=True)
        realised = 1.0 - float(rate)
        at.thresholds[target] += stage.hold * (target - realised)
        at.step += 1
        figures: dict[str, float] = {"step": at.step, "loss": at.loss}
        tokens = budget.accumulate * budget.batch_size * budget.seq_len
        figures["tokens_per_s"] = tokens / (time.perf_counter() - began)
        if stage.forward == "routed":
            figures |= {"sparsity": realised, "target": target}
        return figures

    def _gradients(
        self, stage: Stage, budget: StageBudget, training: Training, target: float, stop: Stop
    ) -> tuple[Tensor, Tensor] | None:
        """Mean loss and execute rate of a step whose gradients are now summed.

        None if a signal came between two micro-batches.
        """
        progress_share, rows = training.at.step / max(1, budget.steps - 1), training.at.micro_batch
        losses, rates = [], []
        for _ in range(budget.accumulate):
            if stop.number and not is_distributed():
                return None
            batch = next(training.batches)
            for loss, rate, part in self.passes.losses(stage, batch, rows, progress_share, target):
                (loss * (part / budget.accumulate)).backward()
                losses.append(loss.detach() * part)
                rates.append(rate * part)
        loss = torch.stack(losses).sum() / budget.accumulate
        rate = torch.stack(rates).sum() / budget.accumulate
        all_reduce([loss, rate, *shared_gradients(training.parameters)])
        return loss, rate

    def _trainable(self, stage: Stage) -> list[nn.Parameter]:
        """The stage's parameters and its adapter's; all others of the method are frozen."""
        parameters = list(stage.parameters)
        if stage.lora is not None:
            adapter = attach_lora(self.model, self.method, stage.lora, seed=self.seed)
            parameters += adapter.parameters()
        self.method.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        return parameters

    def _start_thresholds(self, stage: Stage) -> dict[float, float]:
        """Threshold of each target of the stage."""
        targets = tuple(stage.targets) or (self.method.sparsity,)
        if not stage.calibrate_first:
            self.method.threshold.fill_(0.0)
            return dict.fromkeys(targets, 0.0)
        found = {}
        for target in targets:
            self.method.calibrate(self.probe.sample(START_SHARE), target)
            found[target] = float(self.method.threshold)
        return found

    def _next_target(self, thresholds: dict[float, float], step: int) -> float:
        """Each target once, in an order that is shuffled anew every round."""
        targets = sorted(thresholds)
        turn, place = divmod(step, len(targets))
        random.Random(f"{self.seed}/{turn}").shuffle(targets)
        self.method.threshold.fill_(thresholds[targets[place]])
        return targets[place]

    def _seed(self, name: str) -> None:
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        value = int.from_bytes(digest[:4], "big")
        random.seed(value)
        numpy.random.seed(value)
        torch.manual_seed(value)


def _short(figures: dict[str, float]) -> str:
    return " ".join(f"{k}={v:.3g}" for k, v in figures.items())
