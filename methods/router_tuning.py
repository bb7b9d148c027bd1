"""Router-Tuning: attention that a token may skip, with nothing but routers trained."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from methods.base import Budget, Kind, Probe, RouteContext, RoutedView, Shape, Site, Stage
from methods.options import Gt, Le, Natural, NonNegative, Positive, Sparsity, Training
from methods.parts.gates import straight_through
from methods.parts.penalties import capacity_penalty
from methods.parts.routed_method import RoutedMethod
from methods.parts.routers import Routers


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
        train: `routers`, or `none` for the zero start, which cannot tell tokens apart.
        router_lr: cosine with 3 % of warm-up (published: 1e-5).
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
        train: Literal["none", "routers"] = "routers",
        router_lr: Positive = 1e-5,
        gradient_scale: NonNegative = 1.0,
    ) -> None:
        training = Training(lr=router_lr, schedule="cosine", warmup=0.03)
        super().__init__(sparsity=sparsity, routers=Routers(bias=False), training=training)
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
        if self.train_what == "routers":
            yield self.train_stage("routers", [self.routers], budget.routers)

    def start(self, probe: Probe, sparsity: float) -> None:
        """Begin at 0, where all execute: every score of a zero router is the same, so that no
        threshold would realise the target; the loss brings the rate down from there."""
        self.threshold.zero_()

    def _routed_loss(self, view: RoutedView) -> Tensor:
        target = 1.0 - view.sparsity / self.reach()
        penalty = capacity_penalty(view.site_rates.values(), target, weight=self.gradient_scale)
        return view.task_loss + penalty
