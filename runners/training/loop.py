"""Runs the stages of a recipe. Knows no method: a stage says what to fit or which loss to lower."""

from __future__ import annotations

import hashlib
import logging
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from statistics import fmean
from typing import Any

import numpy
import torch
from torch import Tensor, distributed, nn
from transformers import PreTrainedModel

from methods.base import Budget, Method, Probe, Stage, StageBudget
from methods.engine.decoder.placement import input_device
from methods.engine.lora import attach_lora
from runners.errors import UserError
from runners.runtime.distributed import (
    all_reduce,
    all_reduce_max,
    broadcast_object,
    is_distributed,
    shared_gradients,
)
from runners.runtime.memory import PeakMemory, attempt
from runners.runtime.processes import world_size
from runners.runtime.progress import Bar, note
from runners.runtime.signals import Stop, deferred
from runners.training.flops_target import Saved, calibrate_saving
from runners.training.passes import Objective, Passes
from runners.training.state import Batches, Checkpoint, Position, StageState

log = logging.getLogger(__name__)

START_SHARE = 0.0625
"""Of the calibration text, for the thresholds at which a gradient stage begins; the point's own is
calibrated after it, on all of it."""

LEAST_SIZE = 1e-3
"""Root mean square below which a parameter counts as this large: what starts at zero can move."""

SAID = {
    "loss": "loss {:.4g}",
    "sparsity": "sparsity {:.3f}",
    "target": "target {:g}",
    "tokens_per_s": "{:.0f} tokens/s",
}
"""Figures of a step that the console shows."""

OnStep = Callable[[str, dict[str, float]], None]
OnStart = Callable[[str, int, list[dict[str, float]]], None]


class TrainingDiverged(UserError):
    """A loss became NaN or infinite."""


@dataclass
class StageReport:
    """What one stage cost and reached."""

    name: str
    seconds: float = 0.0
    tokens: int = 0
    """That the stage and its fits read."""
    peak_memory_bytes: int = 0
    steps: int = 0
    final_loss: float | None = None
    micro_batch: int | None = None
    """Rows of a training pass; fewer than the budget's where memory did not suffice."""
    oom_halvings: int = 0
    sparsity: float | None = None
    """Realised by the later half of the steps, on average."""
    target: float | None = None
    """Of those steps; None where the stage trains for no target, or is routed nowhere."""
    figures: dict[str, float] = field(default_factory=dict)
    cached: bool = False

    def to_dict(self) -> dict[str, Any]:
        """JSON form, as in the result record."""
        return asdict(self)

    @property
    def headline(self) -> str:
        """What a log line says of it."""
        parts = [f"{self.name}: {self.seconds:.1f} s", f"{self.tokens} tokens"]
        if self.steps:
            parts += [f"{self.steps} steps", f"loss {self.final_loss:.4g}"]
        if self.sparsity is not None:
            parts.append(f"sparsity {self.sparsity:.3f}")
        return ", ".join([*parts, *(f"{key} {value:.3g}" for key, value in self.figures.items())])


def recipe(method: Method, budget: Budget, saved: Saved | None = None) -> Iterator[Stage]:
    """`fit`, the method's own recipe, and the calibration as its last step.

    Args:
        saved: target in FLOPs; None calibrates to the method's sparsity.
    """
    if type(method).fit is not Method.fit:
        yield Stage("fit", fit=method.fit)
    yield from method.stages(budget)
    figures: dict[str, float] = {}

    def calibrate(probe: Probe) -> None:
        if saved is not None:
            figures.update(calibrate_saving(method, probe, *saved))
            return
        found = method.calibrate(probe, method.sparsity)
        if found is not None:
            figures["realised"] = found

    yield Stage("calibrate", fit=calibrate, report=lambda probe: figures, per_target=True)


def routed_tokens(stage: Stage) -> int:
    """Tokens of a gradient stage of the routed model; 0 of others."""
    if stage.loss is None or stage.budget is None or stage.forward == "dense":
        return 0
    return stage.budget.tokens


class Allowance:
    """Divides what a recipe may read in all among its stages.

    Args:
        tokens: in all; None leaves every stage as its budget has it.
        stages: of the recipe, as the budget has them.
    """

    def __init__(self, tokens: int | None, stages: Iterable[Stage]) -> None:
        self.tokens = tokens
        self.left = sum(map(routed_tokens, stages))

    def of(self, stage: Stage, spent: int) -> int | None:
        """What this stage may read, once `spent` tokens have been; None for what has no steps."""
        own = routed_tokens(stage)
        if self.tokens is None or not own:
            return None
        share = own / self.left
        self.left -= own
        return int(share * (self.tokens - spent))


def lengthened(budget: StageBudget, allowance: int | None, read: float) -> StageBudget:
    """The budget with as many more steps as the allowance leaves after `read` tokens."""
    if allowance is None:
        return budget
    steps = int((allowance - read) / (budget.tokens / budget.steps))
    return replace(budget, steps=max(budget.steps, steps))


class Cost:
    """Seconds, tokens that the probe read, and peak memory, from construction on.

    Args:
        device: whose memory counts.
        probe: counts what it reads in `tokens_read`, if it counts.
    """

    def __init__(self, device: torch.device, probe: Probe) -> None:
        self.probe, self.peak = probe, PeakMemory(device)
        self.began, self.read_before = time.perf_counter(), self._tokens_read()
        self.before = {"seconds": 0.0, "tokens": 0, "peak_memory_bytes": 0}
        """What an earlier process had spent on the stage when it wrote its checkpoint."""

    def read(self) -> dict[str, Any]:
        """Up to now."""
        return {
            "seconds": self.before["seconds"] + time.perf_counter() - self.began,
            "tokens": self.before["tokens"] + self._tokens_read() - self.read_before,
            "peak_memory_bytes": max(self.before["peak_memory_bytes"], self.peak.bytes()),
        }

    def _tokens_read(self) -> int:
        return int(getattr(self.probe, "tokens_read", 0))


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

    def run(
        self, stage: Stage, checkpoint: Checkpoint | None = None, allowance: int | None = None
    ) -> StageReport:
        """Run one stage; the method's modules are changed in place.

        Args:
            checkpoint: kept by a gradient stage, which goes on from it.
            allowance: tokens that a gradient stage may read, its start included: more steps than
                its budget's, never fewer.

        Raises:
            TrainingDiverged: the loss is not finite.
            OutOfReach: the method cannot bypass as much as the target.
            UserError: memory does not suffice.
            Interrupted: a signal asked for the end; the checkpoint is written.
        """
        self._seed(stage.name)
        cost, report = Cost(self.device, self.probe), StageReport(stage.name)
        if stage.fit is not None:
            with Bar(desc=stage.name):
                stage.fit(self.probe)
        else:
            assert stage.budget is not None and stage.loss is not None, stage.name
            kept = checkpoint or Checkpoint()
            at = self._train(stage, stage.budget, cost, kept, allowance)
            report.steps, report.final_loss = at.step, at.loss
            report.micro_batch, report.oom_halvings = at.micro_batch, at.oom_halvings
            report.tokens = at.step * (stage.budget.tokens // stage.budget.steps)
            late = [step for step in at.curve[at.step // 2 :] if "target" in step]
            if late:
                report.sparsity = fmean(step["sparsity"] for step in late)
                if stage.per_target or stage.targets:
                    report.target = fmean(step["target"] for step in late)
        report.seconds, tokens, report.peak_memory_bytes = cost.read().values()
        report.tokens += tokens
        report.figures = stage.report(self.probe) if stage.report else {}
        log.info("stage %s", report.headline)
        return report

    def _train(
        self,
        stage: Stage,
        budget: StageBudget,
        cost: Cost,
        checkpoint: Checkpoint,
        allowance: int | None,
    ) -> Position:
        found = broadcast_object(checkpoint.load)
        with Bar(desc=f"start of {stage.name}"):
            thresholds = self._start_thresholds(stage) if found is None else {}
        if found is not None:
            cost.before = found[1]["cost"]
        budget = lengthened(budget, allowance, cost.read()["tokens"])
        parameters = self._trainable(stage)
        adamw = optimizer(stage, parameters)
        batches = Batches(self.rows(budget), budget.batch_size, self.device)
        state = StageState(
            self.method, parameters, adamw, batches, Position(thresholds, budget.batch_size)
        )
        if found is not None:
            state.restore(found)
            log.info(
                "stage %s goes on after step %d of %d", stage.name, state.at.step, budget.steps
            )
        at = state.at
        self.on_start(stage.name, at.step, at.curve)
        self.method.train()
        with (
            Bar(desc=stage.name, total=budget.steps, initial=at.step) as bar,
            deferred() as stop,
        ):
            while True:
                if is_distributed():  # rows of different processes get different noise
                    self._seed(f"{stage.name}/{at.step}/{distributed.get_rank()}")
                state.begin_step()
                stop.number = all_reduce_max(stop.number or 0) or None
                if stop.number or (at.step < budget.steps and checkpoint.due()):
                    tensors, about = state.save()
                    checkpoint.save(tensors, about | {"cost": cost.read()})
                    stop.obey()
                if at.step == budget.steps:
                    break
                if self._step(stage, budget, state, stop):
                    figures = at.curve[-1]
                    said = [
                        words.format(figures[key]) for key, words in SAID.items() if key in figures
                    ]
                    note(", ".join(said))
                    bar.update()
                    self.on_step(stage.name, figures)
        self.method.eval()
        return at

    def _step(self, stage: Stage, budget: StageBudget, state: StageState, stop: Stop) -> bool:
        """Make one optimiser step; False if it was given up and has to begin again."""
        at, began = state.at, time.perf_counter()
        target = self._next_target(at.thresholds, at.step)
        work = partial(self._gradients, stage, budget, state, target, stop)
        # processes that train together would have to halve alike, but memory lacks in one of them
        found = work() if is_distributed() else attempt(work)
        if found is None:
            state.rewind()
            if not stop.number:
                state.halve(stage.name)
            return False
        loss, rate = found
        norm = nn.utils.clip_grad_norm_(state.parameters, stage.clip_norm)
        at.loss, size = finite(stage, at.step, budget.steps, loss, norm)
        rate_now = set_rate(state.adamw, stage, at.step, budget.steps)
        state.adamw.step()
        state.adamw.zero_grad(set_to_none=True)
        realised = 1.0 - float(rate)
        self._hold(stage, at, target, realised)
        at.step += 1
        if stage.share_text and at.step % len(at.thresholds):
            state.batches.order = state.order
        tokens = budget.tokens / budget.steps
        speed = tokens / (time.perf_counter() - began)
        figures = {"step": at.step, "loss": at.loss, "tokens_per_s": speed}
        figures |= {"lr": rate_now, "gradient_norm": size}
        if stage.forward == "routed":
            figures |= {"sparsity": realised, "target": target}
        at.curve.append(figures)
        return True

    def _hold(self, stage: Stage, at: Position, target: float, realised: float) -> None:
        """Put the threshold of the next step at this target where this step's scores realise it.

        A quantile follows scores of any scale, which a controller of the threshold itself does
        not. Gates that sample realise another share than their scores, so that the share that it
        is taken at is the controller's; hard decisions realise what their scores say, and the
        threshold moves from this step's share by a part of what is missing: the next row of text
        is another, and its share at the same threshold as well.
        """
        if not stage.hold:
            return
        before = realised if stage.hard else at.shares.get(target, target)
        share = before + stage.hold * (target - realised)
        at.shares[target] = min(max(share, 0.0), 1.0)
        found = self.passes.threshold_for(at.shares[target])
        if found is None:
            return
        mean = torch.tensor(found / world_size(), dtype=torch.float64, device=self.device)
        all_reduce([mean])
        if math.isfinite(mean):
            at.thresholds[target] = float(mean)

    def _gradients(
        self, stage: Stage, budget: StageBudget, state: StageState, target: float, stop: Stop
    ) -> tuple[Tensor, Tensor] | None:
        """Mean loss and execute rate of a step whose gradients are now summed.

        None if a signal came between two micro-batches.
        """
        batches = [next(state.batches) for _ in range(budget.accumulate)]
        anneal = state.at.step / max(1, budget.steps - 1)
        losses: list[Tensor] = []
        rates: list[Tensor] = []
        parts = self.passes.micro_batches(stage, batches, state.at.micro_batch, anneal, target)
        for loss, rate, share in parts:
            if losses and stop.number and not is_distributed():
                return None
            (loss * share).backward()
            losses.append(loss.detach() * share)
            rates.append(rate * share)
        loss, rate = torch.stack(losses).sum(), torch.stack(rates).sum()
        all_reduce([loss, rate, *shared_gradients(state.parameters)])
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
        if stage.forward == "dense" or not (stage.per_target or stage.targets):
            self.method.threshold.fill_(0.0)
            return dict.fromkeys(targets, 0.0)
        found = {}
        for target in targets:
            self.method.start(self.probe.sample(START_SHARE), target)
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


def optimizer(stage: Stage, parameters: Sequence[nn.Parameter]) -> torch.optim.AdamW:
    """AdamW on the stage's parameters; each group keeps its full rate as `initial_lr`."""
    groups: list[dict[str, Any]] = [{"params": list(parameters), "lr": stage.lr}]
    if stage.relative_lr:
        sizes = [p.detach().float().square().mean().sqrt() for p in parameters]
        rates = (stage.lr * torch.stack(sizes).clamp_min(LEAST_SIZE)).tolist()
        groups = [{"params": [p], "lr": lr} for p, lr in zip(parameters, rates, strict=True)]
    for group in groups:
        group["initial_lr"] = group["lr"]
    return torch.optim.AdamW(groups, betas=stage.betas, weight_decay=stage.weight_decay)


def set_rate(adamw: torch.optim.AdamW, stage: Stage, step: int, steps: int) -> float:
    """Linear warm-up, then the stage's schedule.

    Args:
        step: from 0.

    Returns:
        The stage's rate at this step; with `relative_lr` a parameter's is that times its size.
    """
    warmup = round(stage.warmup * steps)
    factor = 1.0
    if step < warmup:
        factor = (step + 1) / warmup
    elif stage.schedule == "cosine":
        factor = 0.5 * (1.0 + math.cos(math.pi * ((step - warmup) / max(1, steps - warmup))))
    for group in adamw.param_groups:
        group["lr"] = group["initial_lr"] * factor
    return stage.lr * factor


def finite(
    stage: Stage, step: int, steps: int, loss: Tensor, gradient_norm: Tensor
) -> tuple[float, float]:
    """The loss and the gradient norm as numbers; one transfer for both checks.

    Raises:
        TrainingDiverged: the loss or the gradient norm is not finite.
    """
    value, norm = torch.stack([loss.float(), gradient_norm.float()]).tolist()
    for name, figure in (("loss", value), ("gradient norm", norm)):
        if not math.isfinite(figure):
            raise TrainingDiverged(
                f"stage {stage.name}: {name} is {figure} at step {step + 1} of {steps}; "
                f"lower its learning rate (now {stage.lr:g})"
            )
    return value, norm
