"""FlexiDepth: later blocks that a token may leave for a narrow trained adapter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from methods.base import (
    Budget,
    Decision,
    Method,
    RouteContext,
    RoutedView,
    Shape,
    Site,
    SiteCost,
    Stage,
)
from methods.parts.adapters import Adapter, gate_branch
from methods.parts.bottleneck import BottleneckRouter
from methods.parts.penalties import depth_penalty
from methods.parts.per_site import PerSite


class FlexiDepth(Method):
    """Adaptive depth with a trained bypass (Luo et al., arXiv 2503.23798, COLM 2025).

    The router reads the block's normalised input. A bypassed token writes its keys and values,
    skips attention and takes an adapter instead of the block. What the chosen branch adds is
    scaled by the gate (or by 1 - gate), at inference too; the published code scales the MLP's
    half of the block alone. Gates are sigmoid(score - threshold), so that a threshold of minus
    infinity is the dense model.

    Args:
        first_layer: routed from here on; -1 is the latter half.
        reduction: of the widths of router bottleneck (D / reduction) and adapter (MLP width /
            reduction).
        output: `scaled` as published; `whole` keeps the branch's value and lets the gate carry
            the gradient.
        train_lr: of routers and adapters together, cosine with 3 % of warm-up.
        depth_weight: of the mean over tokens of the squared sum of gates.
        hold: gain of the controller that keeps training at the target by moving the threshold
            after each step; 0 leaves it at 0 as published, where the weight alone sets the depth.
    """

    paper = "arXiv 2503.23798"

    def __init__(
        self,
        *,
        sparsity: float,
        first_layer: int = -1,
        reduction: int = 16,
        output: Literal["scaled", "whole"] = "scaled",
        train: Literal["none", "end_to_end"] = "end_to_end",
        train_lr: float = 1e-4,
        depth_weight: float = 1e-3,
        hold: float = 0.0,
    ) -> None:
        super().__init__(sparsity=sparsity)
        if reduction < 1:
            raise ValueError(f"reduction must be at least 1, not {reduction}")
        self.first_layer, self.reduction, self.output = first_layer, reduction, output
        self.routers = PerSite(lambda width: _router(width, width // reduction))
        self.adapters = PerSite(self._adapter)
        self.train_what, self.train_lr = train, train_lr
        self.depth_weight, self.hold = depth_weight, hold

    def setup(self, shape: Shape) -> None:
        super().setup(shape)
        self.routers.create(self.sites(), shape.width)
        self.adapters.create(self.sites(), shape.width)

    def sites(self) -> Sequence[Site]:
        assert self.shape is not None, "setup() comes first"
        layers = self.shape.layers
        first = layers // 2 if self.first_layer < 0 else self.first_layer
        return [Site(layer, "block") for layer in range(first, layers)]

    def route(self, site: Site, x_BTD: Tensor, ctx: RouteContext) -> Decision:
        decision = self.decide(self.routers(site, x_BTD))
        gate = torch.sigmoid(decision.scores_BT - self.threshold)
        scaled = self.output == "scaled"
        return gate_branch(decision, gate, scaled=scaled, training=ctx.training)

    def approximate(self, site: Site, x_BTD: Tensor) -> Tensor | None:
        output: Tensor = self.adapters(site, x_BTD)
        return output

    def stages(self, budget: Budget) -> Iterable[Stage]:
        if self.train_what == "none":
            return
        yield Stage(
            "train",
            loss=self._routed_loss,
            parameters=[*self.routers.parameters(), *self.adapters.parameters()],
            budget=budget.routers,
            lr=self.train_lr,
            schedule="cosine",
            warmup=0.03,
            betas=(0.9, 0.95),
            per_target=self.hold > 0,
            calibrate_first=self.hold > 0,
            hold=self.hold,
        )

    def cost(self, site: Site) -> SiteCost:
        return SiteCost(
            route=self.routers.flops_per_token(site),
            approximate=self.adapters.flops_per_token(site),
        )

    def _adapter(self, width: int) -> Adapter:
        assert self.shape is not None, "setup() comes first"
        return Adapter(width=width, hidden=self.shape.mlp_width // self.reduction, kind="swiglu")

    def _routed_loss(self, view: RoutedView) -> Tensor:
        assert view.valid_BT is not None
        gates = [torch.sigmoid(d.scores_BT - self.threshold) for d in view.decisions.values()]
        return view.task_loss + depth_penalty(gates, view.valid_BT, weight=self.depth_weight)


def _router(width: int, hidden: int) -> BottleneckRouter:
    """Linear(D, r) -> RMSNorm -> Tanh -> Linear(r, D) -> Linear(D, 1), no biases."""
    head = nn.Sequential(nn.Linear(hidden, width, bias=False), nn.Linear(width, 1, bias=False))
    return BottleneckRouter(width=width, hidden=hidden, activation=nn.Tanh(), head=head, bias=False)
