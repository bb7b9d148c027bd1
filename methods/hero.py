"""HeRo: MLPs with a trained bypass, and a router that remembers the token's way through depth."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

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
from methods.parts.history import HistoryEncoder, unit_rms
from methods.parts.penalties import depth_penalty
from methods.parts.per_site import PerSite
from methods.parts.routers import Router


class HeRo(Method):
    """History-aware routing of MLPs (HeRo, 2026); attention stays dense.

    The score of a token at a layer is a local logit of the residual stream after attention plus a
    history logit: its state and path features, and a linear-attention memory of the layers that
    it passed. The memory runs over depth, within one forward call and one token, so chunks,
    decoding and padding need no care. The chosen branch is scaled by its gate as in FlexiDepth,
    with gate = sigmoid(score - threshold).

    Args:
        first_layer: routed from here on; -1 is the latter half, or from as early as leaves each
            routed MLP at most `share` of its tokens to bypass.
        share: see `first_layer`.
        adapter_width: of the bypass, Linear(D, width) -> SiLU -> Linear(width, D); 0 means
            7 D // 32, the published share.
        output: `scaled` as published; `whole` keeps the branch's value and lets the gate carry
            the gradient.
        train_lr: of routers, history and adapters together, cosine.
        depth_weight: of the mean over tokens of the squared sum of gates.
        hold: gain of the controller that keeps training at the target by moving the threshold
            after each step; 0 leaves it at 0 as published.
    """

    paper = "HeRo, 2026"

    def __init__(
        self,
        *,
        sparsity: float,
        first_layer: int = -1,
        share: float = 0.9,
        adapter_width: int = 0,
        output: Literal["scaled", "whole"] = "scaled",
        train: Literal["none", "end_to_end"] = "end_to_end",
        train_lr: float = 1e-4,
        depth_weight: float = 1e-3,
        hold: float = 0.0,
    ) -> None:
        super().__init__(sparsity=sparsity)
        self.first_layer, self.share, self.output = first_layer, share, output
        self.routers = PerSite(lambda width: Router(width=width))
        self.adapters = PerSite(
            lambda width: Adapter(width=width, hidden=adapter_width or 7 * width // 32, kind="silu")
        )
        self.history: HistoryEncoder | None = None
        self.train_what, self.train_lr = train, train_lr
        self.depth_weight, self.hold = depth_weight, hold

    def setup(self, shape: Shape) -> None:
        super().setup(shape)
        self.history = HistoryEncoder(width=shape.width, layers=shape.layers)
        for site in reversed(self.sites()):
            # From the last layer, so that a layer starts alike whatever the target adds before it.
            self.routers.create([site], shape.width)
            self.adapters.create([site], shape.width)

    def sites(self) -> Sequence[Site]:
        assert self.shape is not None, "setup() comes first"
        layers, first = self.shape.layers, self.first_layer
        if first < 0:
            needed = 2 * self.sparsity * layers / self.share
            first = max(0, min(layers // 2, int(layers - needed)))
        return [Site(layer, "mlp") for layer in range(first, layers)]

    def route(self, site: Site, x_BTD: Tensor, ctx: RouteContext) -> Decision:
        assert self.history is not None
        logit, path = self.history(site.layer, ctx.residual_BTD, ctx.memory.get("path"))
        ctx.memory["path"] = path
        scores = logit + self.routers(site, unit_rms(ctx.residual_BTD.float()))
        decision = self.decide(scores)
        gate = torch.sigmoid(scores - self.threshold)
        scaled = self.output == "scaled"
        return gate_branch(decision, gate, scaled=scaled, training=ctx.training)

    def approximate(self, site: Site, x_BTD: Tensor) -> Tensor | None:
        output: Tensor = self.adapters(site, x_BTD)
        return output

    def stages(self, budget: Budget) -> Iterable[Stage]:
        if self.train_what == "none":
            return
        assert self.history is not None, "setup() comes first"
        parts = (self.routers, self.adapters, self.history)
        yield Stage(
            "train",
            loss=self._routed_loss,
            parameters=[parameter for part in parts for parameter in part.parameters()],
            budget=budget.routers,
            lr=self.train_lr,
            schedule="cosine",
            per_target=True,
            calibrate_first=self.hold > 0,
            hold=self.hold,
        )

    def cost(self, site: Site) -> SiteCost:
        assert self.history is not None
        shared = sum(p.numel() for p in self.history.parameters() if p.dim() == 2)
        width = self.history.query.in_features
        return SiteCost(
            route=self.routers.flops_per_token(site) + 2.0 * shared + 5.0 * width * width,
            approximate=self.adapters.flops_per_token(site),
        )

    def _routed_loss(self, view: RoutedView) -> Tensor:
        assert view.valid_BT is not None
        gates = [torch.sigmoid(d.scores_BT - self.threshold) for d in view.decisions.values()]
        return view.task_loss + depth_penalty(gates, view.valid_BT, weight=self.depth_weight)
