"""Runs the stages of a recipe. Knows no method: a stage says what to fit or which loss to lower."""

from __future__ import annotations

import hashlib
import logging
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from methods.base import Method, Probe, RoutedView, Site, Stage, StageBudget, UnitView
from methods.engine.adapter import decoder
from methods.engine.lora import attach_lora
from methods.engine.observe import observed
from methods.engine.wrap import Routing, routed, routing_of
from runners.errors import UserError
from runners.losses import distillation_loss, hidden_states, language_model_loss
from runners.memory import PeakMemory
from runners.optimise import TrainingDiverged as TrainingDiverged
from runners.optimise import finite, optimiser
from runners.progress import progress

log = logging.getLogger(__name__)

Objective = Literal["lm", "distill"]
OnStep = Callable[[str, dict[str, float]], None]


@dataclass
class StageReport:
    """What one stage cost and reached."""

    name: str
    seconds: float
    tokens: int
    steps: int
    peak_memory_bytes: int
    final_loss: float | None = None
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
    ) -> None:
        self.model, self.method, self.probe, self.rows = model, method, probe, rows
        self.objective, self.seed, self.on_step = objective, seed, on_step
        self.device = next(model.parameters()).device

    def run(self, stage: Stage) -> StageReport:
        """Run one stage; the method's modules are changed in place.

        Raises:
            TrainingDiverged: the loss is not finite.
            UserError: the target sparsity is out of the method's reach.
        """
        self._seed(stage.name)
        peak, start = PeakMemory(self.device), time.perf_counter()
        read_before = getattr(self.probe, "tokens_read", 0)
        steps, trained_tokens, loss = 0, 0, None
        if stage.fit is not None:
            stage.fit(self.probe)
        else:
            assert stage.budget is not None and stage.loss is not None, stage.name
            loss = self._train(stage, stage.budget)
            steps, trained_tokens = stage.budget.steps, stage.budget.tokens
        tokens = trained_tokens + getattr(self.probe, "tokens_read", 0) - read_before
        seconds = time.perf_counter() - start
        figures = stage.report(self.probe) if stage.report else {}
        log.info("stage %s: %.1f s, %d tokens %s", stage.name, seconds, tokens, _short(figures))
        return StageReport(stage.name, seconds, tokens, steps, peak.bytes(), loss, figures)

    def _train(self, stage: Stage, budget: StageBudget) -> float:
        thresholds = self._start_thresholds(stage)
        parameters = self._trainable(stage)
        adamw, schedule = optimiser(stage, parameters, budget)
        batches = self._batches(budget)
        self.method.train()
        value = math.nan
        bar = progress(range(budget.steps), stage.name)
        for step in bar:
            began = time.perf_counter()
            target = self._next_target(thresholds, step)
            losses, rates = [], []
            for _ in range(budget.accumulate):
                loss, rate = self._loss(
                    stage, next(batches), step / max(1, budget.steps - 1), target
                )
                (loss / budget.accumulate).backward()
                losses.append(loss.detach())
                rates.append(rate)
            norm = nn.utils.clip_grad_norm_(parameters, stage.clip_norm)
            value = finite(stage, step, budget.steps, torch.stack(losses).mean(), norm)
            adamw.step()
            schedule.step()
            adamw.zero_grad(set_to_none=True)
            realised = 1.0 - float(torch.stack(rates).mean())
            thresholds[target] += stage.hold * (target - realised)
            tokens = budget.accumulate * budget.batch_size * budget.seq_len
            figures = {"step": step + 1, "loss": value}
            figures["tokens_per_s"] = tokens / (time.perf_counter() - began)
            if stage.forward == "routed":
                figures |= {"sparsity": realised, "target": target}
            bar.set_postfix({k: f"{v:.4g}" for k, v in figures.items() if k != "step"})
            self.on_step(stage.name, figures)
        self.method.eval()
        return value

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

    def _loss(
        self, stage: Stage, batch: Tensor, progress_share: float, target: float
    ) -> tuple[Tensor, Tensor]:
        """Loss of one micro-batch and its mean execute rate (1 under the dense forward)."""
        if stage.forward == "dense":
            return self._dense_loss(stage, batch), torch.ones(())
        teacher = None
        if self.objective == "distill":
            with torch.no_grad():
                teacher = hidden_states(self.model, batch)
        with routed(self.model, self.method, "gathered" if stage.hard else "masked"):
            routing = routing_of(self.model)
            routing.training = not stage.hard
            routing.anneal, routing.target = progress_share, target
            if teacher is None:
                task = language_model_loss(self.model, batch)
            else:
                task = distillation_loss(self.model, batch, teacher)
            view = (counted_view if stage.hard else routed_view)(routing, task, target)
        return stage.loss(view), view.execute_rate.detach()  # type: ignore[misc, arg-type]

    def _dense_loss(self, stage: Stage, batch: Tensor) -> Tensor:
        """Sum over units; the model runs without gradient, the loss of each unit with it."""
        total = torch.zeros((), device=self.device)

        def visit(view: UnitView) -> None:
            nonlocal total
            with torch.enable_grad():
                total = total + stage.loss(view)  # type: ignore[misc, arg-type]

        with torch.no_grad(), observed(self.model, visit):
            decoder(self.model)(input_ids=batch, use_cache=False)
        return total

    def _start_thresholds(self, stage: Stage) -> dict[float, float]:
        """Threshold of each target of the stage."""
        targets = tuple(stage.targets) or (self.method.sparsity,)
        if not stage.calibrate_first:
            self.method.threshold.fill_(0.0)
            return dict.fromkeys(targets, 0.0)
        found = {}
        for target in targets:
            self.method.calibrate(self.probe.sample(), target)
            found[target] = float(self.method.threshold)
        return found

    def _next_target(self, thresholds: dict[float, float], step: int) -> float:
        """Each target once, in an order that is shuffled anew every round."""
        targets = sorted(thresholds)
        turn, place = divmod(step, len(targets))
        random.Random(f"{self.seed}/{turn}").shuffle(targets)
        self.method.threshold.fill_(thresholds[targets[place]])
        return targets[place]

    def _batches(self, budget: StageBudget) -> Iterator[Tensor]:
        """Endless batches; every row once an epoch, in an order drawn from the stage's seed."""
        rows = self.rows(budget)
        if len(rows) < budget.batch_size:
            raise UserError(
                f"the training text gives {len(rows)} rows of {budget.seq_len} tokens, fewer than "
                f"a batch of {budget.batch_size}: give more text or a smaller budget"
            )
        order = torch.randperm(len(rows))
        while True:
            while len(order) < budget.batch_size:
                order = torch.cat([order, torch.randperm(len(rows))])
            yield rows[order[: budget.batch_size]].to(self.device)
            order = order[budget.batch_size :]

    def _seed(self, name: str) -> None:
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        value = int.from_bytes(digest[:4], "big")
        random.seed(value)
        numpy.random.seed(value)
        torch.manual_seed(value)


def routed_view(routing: Routing, task_loss: Tensor, target: float) -> RoutedView:
    """Rates and side losses of the forward that just ran in training mode."""
    valid = routing.state.valid_BT
    assert valid is not None
    units = len(routing.counters.shape.units())
    rates: dict[Site, Tensor] = {}
    dropped = sum(len(site.units) for site in routing.counters.dropped)
    bypassed = torch.full((), float(dropped), device=task_loss.device)
    auxiliary = []
    for site, decision in routing.decisions.items():
        rate = (decision.gate_BT * valid).sum() / valid.sum()
        rates[site] = rate
        bypassed = bypassed + (1.0 - rate) * len(site.units)
        if decision.auxiliary is not None:
            auxiliary.append(decision.auxiliary)
    side = torch.stack(auxiliary).mean() if auxiliary else torch.zeros_like(bypassed)
    return RoutedView(
        task_loss,
        1.0 - bypassed / units,
        rates,
        side,
        target,
        decisions=dict(routing.decisions),
        valid_BT=valid,
        anneal=routing.anneal,
    )


def counted_view(routing: Routing, task_loss: Tensor, target: float) -> RoutedView:
    """The same without gradient, for the forward of a `hard` stage: counts over valid tokens."""
    usage = routing.counters.read()
    rates = {
        site: torch.tensor(done / usage.tokens, device=task_loss.device)
        for site, done in usage.decided.items()
    }
    rate = torch.tensor(1.0 - usage.sparsity(), device=task_loss.device)
    return RoutedView(task_loss, rate, rates, torch.zeros_like(rate), target)


def _short(figures: dict[str, float]) -> str:
    return " ".join(f"{k}={v:.3g}" for k, v in figures.items())
