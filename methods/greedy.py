"""Greedy routing: execute the tokens with the highest scores, skip the rest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from methods.base import Budget, Decision, LinearUnit, RouteContext, RoutedView, Site, Stage
from methods.options import (
    Count,
    ForecasterOptions,
    NonNegative,
    Positive,
    RouterOptions,
    Sparsity,
    Training,
    grouped,
)
from methods.parts.forecaster import Forecasters
from methods.parts.gates import membership_loss, sigmoid_gate, straight_through, top_share
from methods.parts.routed_method import RoutedMethod
from methods.parts.routers import Routers

ROUTER, TRAINING = RouterOptions(), Training()


class Greedy(RoutedMethod):
    """Execute-or-skip with expert-choice training (Raposo et al., arXiv 2404.02258).

    In training the top (1 - s) T tokens of each sequence execute, and a BCE teaches the score to
    tell whether a token was among them; at inference the calibrated threshold on that score
    decides from the past alone. The published gate multiplies the output by the score; here the
    score carries the gradient while the value stays 1, because the frozen model was not trained
    to see its outputs scaled.

    Args:
        bypass: `skip`, or `forecast` for the ablation that gives greedy a forecaster.
        rank: of the forecasters, if any.
        router: `RouterOptions`; its start regresses log ||what a skip would miss||, whatever a
            bypassed token gets: the router stays greedy's.
        damping: of the ridge regressions.
        train: `routers` runs the gradient stage, `none` keeps the start.
        choice: what executes in training: `top_share` of each sequence at every unit alike, as
            published, or what lies above the `threshold`, so that units keep the shares that the
            start gave them, and no membership is taught.
        training: `Training`, of that stage.
        bce_weight: of the top-k membership loss.
        targets: train one model for these sparsities in turn, shared by all points of a sweep;
            empty trains for the point's own.
    """

    paper = "arXiv 2404.02258"

    def __init__(
        self,
        *,
        sparsity: Sparsity,
        bypass: Literal["skip", "forecast"] = "skip",
        rank: Count = 64,
        router: RouterOptions = ROUTER,
        damping: Positive = 1e-3,
        train: Literal["none", "routers"] = "none",
        choice: Literal["top_share", "threshold"] = "top_share",
        training: Training = TRAINING,
        bce_weight: NonNegative = 1.0,
        targets: Sequence[Sparsity] = (),
    ) -> None:
        router, options = grouped(router, ROUTER), ForecasterOptions(damping=damping)
        super().__init__(
            sparsity=sparsity,
            routers=Routers(kind=router.kind, hidden=router.width),
            forecasters=Forecasters(rank=rank, options=options) if bypass == "forecast" else None,
            training=grouped(training, TRAINING),
            targets=targets,
        )
        self.router, self.damping, self.train_what = router, damping, train
        self.choice, self.bce_weight = choice, bce_weight

    def route(self, site: Site, x_BTD: Tensor, ctx: RouteContext) -> Decision:
        if not ctx.training or self.choice == "threshold":
            return super().route(site, x_BTD, ctx)
        scores = self.score(site, x_BTD, ctx)
        target = self.sparsity if ctx.target is None else ctx.target
        execute = top_share(scores.detach(), ctx.valid_BT, 1.0 - target)
        logits = scores - self.threshold
        gate = straight_through(torch.sigmoid(logits) * execute, execute)
        membership = membership_loss(logits, execute, ctx.valid_BT)
        return Decision(execute, gate, scores, auxiliary=membership)

    def gate(self, logits_BT: Tensor, ctx: RouteContext) -> Tensor:
        return sigmoid_gate(logits_BT, tau=1.0)

    def linear(self, site: Site) -> LinearUnit | None:
        return self.linear_unit(site)

    def stages(self, budget: Budget) -> Iterable[Stage]:
        yield from self.start_stages(self.router, budget, damping=self.damping, missed_by=None)
        if self.train_what == "routers":
            yield self.train_stage("routers", [self.routers], budget.routers)

    def _routed_loss(self, view: RoutedView) -> Tensor:
        return view.task_loss + self.bce_weight * view.auxiliary
