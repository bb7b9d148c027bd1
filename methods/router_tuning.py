"""Router-Tuning: attention that a token may skip, with nothing but routers trained."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from methods.base import Budget, Kind, Probe, RouteContext, RoutedView, Shape, Site, Stage
from methods.options import Gt, Le, Natural, NonNegative, Sparsity, Start, Training, grouped
from methods.parts.gates import straight_through
from methods.parts.penalties import capacity_penalty
from methods.parts.routed_method import RoutedMethod
from methods.parts.routers import Routers

TRAINING = Training(lr=1e-5, schedule="cosine", warmup=0.03)


class RouterTuning(RoutedMethod):
    """MindSkip (He et al., Router-Tuning, arXiv 2410.13184), per token.

    A linear router without bias reads the unit's normalised input and starts at zero, so that the
    first step executes everything (sigmoid 0.5 >= 0.5). The gate is hard, its gradient that of the
    sigmoid. The paper's variant that pools the whole sequence sees later tokens and is left out.

    Args:
        part: which units are routed.
        layers: how many; the last layer is taken last, the others from the end. 0 is the paper's
            half, or as many as leave each routed unit at most `share` of its tokens to bypass: a
            half of the attention is no more than a quarter of all units.
        share: see `layers`.
        start: `published`, or `closed_form`: routers, which get a bias, as the regression of what
            a skip would miss.
        train: `routers`, or `none` for the start; the published one cannot tell tokens apart.
        training: `Training`, of the routers.
        gradient_scale: of sum over units of relu(execute rate - its target).
    """

    paper = "arXiv 2410.13184"

    def __init__(
        self,
        *,
        sparsity: Sparsity,
        part: Kind = "attention",
        layers: Natural = 0,
        share: Annotated[float, Gt(0.0), Le(1.0)] = 0.8,
        start: Start = "published",
        train: Literal["none", "routers"] = "routers",
        training: Training = TRAINING,
        gradient_scale: NonNegative = 1.0,
    ) -> None:
        super().__init__(
            sparsity=sparsity,
            routers=Routers(bias=start == "closed_form"),
            training=grouped(training, TRAINING),
        )
        self.start_what = start
        self.part, self.layers, self.share = part, layers, share
        self.train_what, self.gradient_scale = train, gradient_scale

    def setup(self, shape: Shape) -> None:
        super().setup(shape)
        for parameter in self.routers.parameters():
            nn.init.zeros_(parameter)

    def sites(self) -> Sequence[Site]:
        assert self.shape is not None, "setup() comes first"
        total = self.shape.layers
        order = [*range(total - 2, -1, -1), total - 1]
        units = 2.0 / len(Site(0, self.part).units)
        needed = math.ceil(self.sparsity * units * total / self.share - 1e-9)
        count = min(self.layers or max(total // 2, needed), total)
        return [Site(layer, self.part) for layer in sorted(order[:count])]

    def gate(self, logits_BT: Tensor, ctx: RouteContext) -> Tensor:
        return straight_through(torch.sigmoid(logits_BT), logits_BT >= 0)

    def stages(self, budget: Budget) -> Iterable[Stage]:
        if self.start_what == "closed_form":
            for stage in self.closed_form_stages(budget):
                yield replace(stage, per_target=True)  # the target says which layers are routed
        if self.train_what == "routers":
            yield self.train_stage("routers", [self.routers], budget.routers)

    def start(self, probe: Probe, sparsity: float) -> None:
        """Begin at 0 from zero routers, where all execute: every score is the same, so that no
        threshold would realise the target; the loss brings the rate down from there."""
        if self.start_what == "closed_form":
            super().start(probe, sparsity)
        else:
            self.threshold.zero_()

    def _routed_loss(self, view: RoutedView) -> Tensor:
        target = 1.0 - view.sparsity / self.reach()
        penalty = capacity_penalty(view.site_rates.values(), target, weight=self.gradient_scale)
        return view.task_loss + penalty
