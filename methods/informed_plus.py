"""Informed routing, extended: a closed-form start, then distillation of the whole routed model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from methods.base import (
    Budget,
    Decision,
    KVPolicy,
    Method,
    Probe,
    RouteContext,
    RoutedView,
    Shape,
    Site,
    SiteCost,
    Stage,
)
from methods.parts.closed_form import refit_on_routed
from methods.parts.forecaster import Forecasters
from methods.parts.gates import sigmoid_gate
from methods.parts.lora import lora_spec, lora_stage
from methods.parts.penalties import sparsity_penalty
from methods.parts.recoverability import fit_recoverability
from methods.parts.routers import Routers


class InformedPlus(Method):
    """Informed routing (arXiv 2510.13831) with what survived ablation; ours, not the paper's.

    1. Forecasters in closed form: reduced-rank ridge regression of each unit's output.
    2. Recoverability routers: ridge regression of the log of the forecast's error, weighted by the
       unit's loss sensitivity, so that one global threshold spends the budget where it matters.
    3. Error-aware refit: forecasters again, on the stream that forecasts upstream have changed, and
       routers for the new forecasters.
    4. End-to-end distillation of forecasters and routers: KL to the dense model's distributions,
       straight-through sigmoid gates, a controller that holds the realised sparsity at the target.

    Every part can be switched off; `experiment=ablation` compares them at one budget.

    Args:
        rank: of the forecasters; their mean with `allocate`.
        allocate: spend the total rank by explained variance times loss sensitivity.
        branch: rank of a SiLU branch beside each linear map, zero until trained.
        start: `closed_form`, or `random` (published initialisation) for the ablation.
        sensitivity: weight the routers' regression by each unit's loss sensitivity.
        refit: part 3.
        train: part 4 for `both`, `forecasters` or `routers`; `none` leaves it out.
        targets: one budget-conditional training for these sparsities in turn; empty trains for the
            point's own.
        train_lr: share of a parameter's root mean square that a step may move it.
        tau: temperature of the gates' gradient.
        hold: gain of the threshold controller; 0 leaves the threshold where calibration put it.
        penalty_weight: of |(1 - s) - mean execute rate|.
        lora: options of `LoraSpec` for a fine-tuning stage at the end; None for none.
        lora_lr: of that stage.
        kv_policy: `keep` or `evict`.
    """

    paper = "extends arXiv 2510.13831"

    def __init__(
        self,
        *,
        sparsity: float,
        rank: int = 128,
        allocate: bool = True,
        branch: int = 0,
        damping: float = 1e-3,
        start: Literal["closed_form", "random"] = "closed_form",
        sensitivity: bool = True,
        refit: bool = True,
        train: Literal["none", "forecasters", "routers", "both"] = "both",
        targets: Sequence[float] = (),
        train_lr: float = 0.03,
        tau: float = 1.0,
        hold: float = 0.3,
        penalty_weight: float = 0.0,
        lora: Mapping[str, Any] | None = None,
        lora_lr: float = 2e-4,
        kv_policy: KVPolicy = "keep",
    ) -> None:
        super().__init__(sparsity=sparsity)
        if train not in ("none", "forecasters", "routers", "both"):
            raise ValueError(f"train must be none, forecasters, routers or both, not {train!r}")
        self.forecasters = Forecasters(rank=rank, damping=damping, allocate=allocate, branch=branch)
        self.routers = Routers(kind="linear", outputs=1)
        self.damping, self.start, self.sensitivity = damping, start, sensitivity
        self.refit, self.train_what, self.targets = refit, train, tuple(targets)
        self.train_lr, self.tau, self.hold = train_lr, tau, hold
        self.penalty_weight = penalty_weight
        self.lora, self.lora_lr = lora_spec(lora), lora_lr
        self.kv_policy = kv_policy

    def setup(self, shape: Shape) -> None:
        super().setup(shape)
        self.routers.create(self.sites(), shape.width)
        self.forecasters.create(self.sites(), shape.width)

    def adopt(self, shapes: Mapping[str, Sequence[int]]) -> None:
        self.forecasters.adopt(shapes, "forecasters.")

    def route(self, site: Site, x_BTD: Tensor, ctx: RouteContext) -> Decision:
        scores = self.routers(site, x_BTD)
        if not ctx.training:
            return self.decide(scores)
        gate = sigmoid_gate(scores - self.threshold, tau=self.tau)
        return Decision(gate > 0.5, gate, scores)

    def approximate(self, site: Site, x_BTD: Tensor) -> Tensor | None:
        return self.forecasters(site, x_BTD)

    def stages(self, budget: Budget) -> Iterable[Stage]:
        if self.start == "closed_form":
            yield self.forecasters.stage(budget.forecasters)
            yield Stage("router_start", fit=self._start_routers)
            if self.refit:
                yield Stage("refit", fit=self._refit, per_target=not self.targets)
        if self.train_what != "none":
            yield Stage(
                "distill",
                loss=self._loss,
                parameters=self._trained(),
                hard=self.train_what == "forecasters",
                budget=budget.routers,
                lr=self.train_lr,
                relative_lr=True,
                schedule="cosine",
                warmup=0.1,
                weight_decay=0.0,
                betas=(0.9, 0.95),
                hold=self.hold,
                per_target=not self.targets,
                targets=self.targets,
                calibrate_first=True,
            )
        if self.lora is not None:
            yield lora_stage(self.lora, budget.lora, lr=self.lora_lr, targets=self.targets)

    def cost(self, site: Site) -> SiteCost:
        return SiteCost(
            route=self.routers.at(site).flops_per_token,
            approximate=self.forecasters.flops_per_token(site),
        )

    def _start_routers(self, probe: Probe) -> None:
        fit_recoverability(
            probe,
            self.routers,
            self.forecasters,
            damping=self.damping,
            sensitivity=self.sensitivity,
        )

    def _refit(self, probe: Probe) -> None:
        """At the point's target, or at the middle one of a budget-conditional training."""
        middle = sorted(self.targets)[len(self.targets) // 2] if self.targets else self.sparsity
        self.calibrate(probe, middle)
        refit_on_routed(probe, self.forecasters, damping=self.damping)
        self._start_routers(probe)

    def _trained(self) -> list[nn.Parameter]:
        chosen: list[nn.Module] = []
        if self.train_what in ("routers", "both"):
            chosen.append(self.routers)
        if self.train_what in ("forecasters", "both"):
            chosen.append(self.forecasters)
        return [parameter for part in chosen for parameter in part.parameters()]

    def _loss(self, view: RoutedView) -> Tensor:
        penalty = sparsity_penalty(view.execute_rate, view.sparsity, weight=self.penalty_weight)
        return view.task_loss + penalty
