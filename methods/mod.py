"""Mixture-of-Depths: each block picks the tokens that it executes, the others pass it by."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from methods.base import (
    Budget,
    Decision,
    Probe,
    RouteContext,
    RoutedView,
    Site,
    SiteCost,
    Stage,
    UnitView,
)
from methods.options import (
    LoraSpec,
    Natural,
    NonNegative,
    Positive,
    Sparsity,
    Start,
    Training,
    grouped,
)
from methods.parts.gates import membership_loss, straight_through, top_share
from methods.parts.routed_method import RoutedMethod
from methods.parts.routers import Routers

TRAINING = Training(lr=1e-3, schedule="cosine")


class MoD(RoutedMethod):
    """Expert choice over whole blocks (Raposo et al., arXiv 2404.02258), on a pretrained model.

    In training a block executes the top share of each sequence by a linear score of the residual
    stream; attention runs among those tokens only. At inference a token's own logit decides
    against the calibrated threshold: the score, which a BCE taught to tell membership, or a
    predictor's.

    Args:
        layers: `alternate` routes every other block (the paper's best), which bounds the sparsity
            by a half; `every` routes all.
        decision: `score` (section 3.5, first way: BCE on the router itself) or `predictor`
            (second way: a small MLP on the detached stream).
        output: `scaled` multiplies the block by the sigmoid of the score, `whole` keeps its value
            and lets the score carry the gradient: a frozen model was not trained to be scaled.
        predictor_width: hidden width of the predictor; 0 means D // 4.
        start: `published`, or `closed_form`: scores as the regression of what the block adds.
        train: `routers` (and adapters), in which every block executes the same share; `adapters`
            alone on the decisions of inference, or `none` for the start alone.
        training: `Training`, of routers and adapters together.
        bce_weight: of the membership loss.
        lora: adapters (`LoraSpec` fields), or None.
        lora_lr: of adapters alone.
    """

    paper = "arXiv 2404.02258"
    kv_policy = "evict"

    def __init__(
        self,
        *,
        sparsity: Sparsity,
        layers: Literal["alternate", "every"] = "alternate",
        decision: Literal["score", "predictor"] = "score",
        output: Literal["whole", "scaled"] = "whole",
        predictor_width: Natural = 0,
        start: Start = "published",
        train: Literal["none", "adapters", "routers"] = "routers",
        training: Training = TRAINING,
        bce_weight: NonNegative = 1.0,
        lora: LoraSpec | None = None,
        lora_lr: Positive = 2e-4,
    ) -> None:
        training = grouped(training, TRAINING)
        super().__init__(
            sparsity=sparsity, routers=Routers(), training=training, lora=lora, lora_lr=lora_lr
        )
        self.start_what = start
        if decision == "predictor" and output == "scaled":
            raise ValueError(
                "output=scaled needs decision=score: a predictor tells who, not how much"
            )
        self.stride, self.first = (2, 1) if layers == "alternate" else (1, 0)
        self.predictors: Routers | None = None
        if decision == "predictor":
            self.predictors = Routers(kind="mlp", hidden=predictor_width)
        self.output, self.train_what, self.bce_weight = output, train, bce_weight

    def sites(self) -> Sequence[Site]:
        assert self.shape is not None, "setup() comes first"
        return [Site(i, "block") for i in range(self.first, self.shape.layers, self.stride)]

    def route(self, site: Site, x_BTD: Tensor, ctx: RouteContext) -> Decision:
        if not ctx.training:
            decider = self.predictors or self.routers
            decision = self.decide(decider(site, ctx.residual_BTD))
            return self._scaled(decision, decision.scores_BT)
        scores = self.routers(site, ctx.residual_BTD)
        target = self.sparsity if ctx.target is None else ctx.target
        execute = top_share(scores.detach(), ctx.valid_BT, 1.0 - target / self.reach())
        logits = scores
        if self.predictors is not None:
            logits = self.predictors(site, ctx.residual_BTD.detach())
        membership = membership_loss(logits - self.threshold, execute, ctx.valid_BT)
        gate = straight_through(torch.sigmoid(scores - self.threshold) * execute, execute)
        return self._scaled(Decision(execute, gate, logits, auxiliary=membership), scores)

    def read_unit(self, view: UnitView) -> Tensor:
        return view.residual_ND

    def stages(self, budget: Budget) -> Iterable[Stage]:
        if self.start_what == "closed_form":
            yield from self.closed_form_stages(budget)
        if self.train_what == "routers":
            parts = [self.routers, self.predictors]
            yield self.train_stage("train", parts, budget.routers, lora=self.lora)
        if self.train_what == "adapters":
            yield from self.lora_stages(budget)

    def _routed_loss(self, view: RoutedView) -> Tensor:
        return view.task_loss + self.bce_weight * view.auxiliary

    def start(self, probe: Probe, sparsity: float) -> None:
        """Begin at 0: the top share executes in training whatever the threshold, and the BCE
        teaches sigmoid(score) > 0.5 to tell who was in it."""
        self.threshold.zero_()

    def cost(self, site: Site) -> SiteCost:
        return SiteCost(route=(self.predictors or self.routers).flops_per_token(site))

    def _scaled(self, decision: Decision, scores_BT: Tensor) -> Decision:
        if self.output == "scaled":
            decision.scale_BT = torch.sigmoid(scores_BT - self.threshold)
        return decision
