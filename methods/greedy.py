"""Greedy routing: execute the tokens with the highest scores, skip the rest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from methods.base import (
    Budget,
    Decision,
    LinearUnit,
    Method,
    Probe,
    RouteContext,
    RoutedView,
    Shape,
    Site,
    SiteCost,
    Stage,
)
from methods.parts.balance import shift_stage
from methods.parts.expert_choice import membership_loss, top_share
from methods.parts.forecaster import Forecasters
from methods.parts.gates import straight_through
from methods.parts.linear import linear_unit
from methods.parts.recoverability import fit_recoverability
from methods.parts.routers import Routers


class Greedy(Method):
    """Execute-or-skip with expert-choice training (Raposo et al., arXiv 2404.02258).

    In training the top (1 - s) T tokens of each sequence execute, and a BCE teaches the score to
    tell whether a token was among them; at inference the calibrated threshold on that score
    decides from the past alone. The published gate multiplies the output by the score; here the
    score carries the gradient while the value stays 1, because the frozen model was not trained
    to see its outputs scaled.

    Args:
        bypass: `skip`, or `forecast` for the ablation that gives greedy a forecaster.
        rank: of the forecasters, if any.
        router_start: `recoverability` regresses log ||what a skip would miss||, as informed
            routing's start does for a forecast; `none` starts at random.
        sensitivity: weight the regression by each unit's loss sensitivity.
        kind_shift: after that start, move the MLP scores to where the routed model loses least.
        train: `routers` runs the gradient stage, `none` keeps the start.
        router_lr: of the gradient stage, constant.
        bce_weight: of the top-k membership loss.
        targets: train one model for these sparsities in turn, shared by all points of a sweep;
            empty trains for the point's own.
    """

    paper = "arXiv 2404.02258"

    def __init__(
        self,
        *,
        sparsity: float,
        bypass: Literal["skip", "forecast"] = "skip",
        rank: int = 64,
        router_start: Literal["recoverability", "none"] = "recoverability",
        sensitivity: bool = True,
        kind_shift: bool = False,
        damping: float = 1e-3,
        train: Literal["none", "routers"] = "none",
        router_lr: float = 2e-3,
        bce_weight: float = 1.0,
        targets: Sequence[float] = (),
    ) -> None:
        super().__init__(sparsity=sparsity)
        forecast = bypass == "forecast"
        self.forecasters = Forecasters(rank=rank, damping=damping) if forecast else None
        self.routers = Routers(kind="linear", outputs=1)
        self.router_start, self.train_what = router_start, train
        self.sensitivity, self.damping = sensitivity, damping
        self.kind_shift = kind_shift and router_start == "recoverability"
        self.router_lr, self.bce_weight = router_lr, bce_weight
        self.targets = tuple(targets)

    def setup(self, shape: Shape) -> None:
        super().setup(shape)
        self.routers.create(self.sites(), shape.width)
        if self.forecasters is not None:
            self.forecasters.create(self.sites(), shape.width)

    def route(self, site: Site, x_BTD: Tensor, ctx: RouteContext) -> Decision:
        scores = self.routers(site, x_BTD)
        if not ctx.training:
            return self.decide(scores)
        target = self.sparsity if ctx.target is None else ctx.target
        execute = top_share(scores.detach(), ctx.valid_BT, 1.0 - target)
        logits = scores - self.threshold
        gate = straight_through(torch.sigmoid(logits) * execute, execute)
        membership = membership_loss(logits, execute, ctx.valid_BT)
        return Decision(execute, gate, scores, auxiliary=membership)

    def approximate(self, site: Site, x_BTD: Tensor) -> Tensor | None:
        return None if self.forecasters is None else self.forecasters(site, x_BTD)

    def linear(self, site: Site) -> LinearUnit | None:
        return linear_unit(self.routers, self.forecasters, site)

    def stages(self, budget: Budget) -> Iterable[Stage]:
        if self.forecasters is not None:
            yield self.forecasters.stage(budget.forecasters)
        if self.router_start == "recoverability":
            yield Stage("router_start", fit=self._start_routers)
        if self.kind_shift:
            yield shift_stage(self.routers, self.threshold, self.targets, self.sparsity)
        if self.train_what == "routers":
            yield Stage(
                "routers",
                loss=self._routed_loss,
                parameters=list(self.routers.parameters()),
                budget=budget.routers,
                lr=self.router_lr,
                per_target=not self.targets,
                targets=self.targets,
                calibrate_first=self.router_start == "recoverability",
            )

    def cost(self, site: Site) -> SiteCost:
        estimate = 0.0 if self.forecasters is None else self.forecasters.flops_per_token(site)
        return SiteCost(route=self.routers.at(site).flops_per_token, approximate=estimate)

    def _start_routers(self, probe: Probe) -> None:
        """What a *skip* would miss, whatever a bypassed token gets: the router stays greedy's."""
        fit_recoverability(
            probe, self.routers, None, damping=self.damping, sensitivity=self.sensitivity
        )

    def _routed_loss(self, view: RoutedView) -> Tensor:
        return view.task_loss + self.bce_weight * view.auxiliary
