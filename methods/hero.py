"""HeRo: MLPs with a trained bypass, and a router that remembers the token's way through depth."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Annotated, Literal

from torch import Tensor, nn

from methods.base import Budget, RouteContext, Shape, Site, SiteCost, Stage, UnitView
from methods.options import Ge, Gt, Le, Natural, NonNegative, Sparsity, Start, Training, grouped
from methods.parts.history import HistoryEncoder, unit_rms
from methods.parts.narrow_ffn import NarrowFFN
from methods.parts.routers import PerSite, Routers
from methods.parts.trained_bypass import LaterMLPs

TRAINING = Training(lr=1e-4, schedule="cosine")


class HeRo(LaterMLPs):
    """History-aware routing of MLPs (HeRo, 2026); attention stays dense.

    The score of a token at a layer is a local logit of the residual stream after attention plus a
    history logit: its state and path features, and a linear-attention memory of the layers that
    it passed. The memory runs over depth, within one forward call and one token, so chunks,
    decoding and padding need no care. The chosen branch is scaled by its gate as in FlexiDepth.

    Args:
        first_layer: routed from here on; -1 is the latter half, or from as early as leaves each
            routed MLP at most `share` of its tokens to bypass.
        share: see `first_layer`.
        adapter_width: of the bypass, Linear(D, width) -> SiLU -> Linear(width, D); 0 means
            7 D // 32, the published share.
        output: `scaled` as published; `whole` keeps the branch's value and lets the gate carry
            the gradient.
        start: `published`, or `closed_form`: adapters as forecasters of the MLPs, local routers as
            the regression of their error, a history that says nothing yet.
        train: `end_to_end` (routers and adapters, as published), `adapters` alone, on the decisions
            of its routers, or `none` for what it starts with.
        training: `Training`, of routers, history and adapters together.
        depth_weight: of the mean over tokens of the squared sum of gates.
    """

    paper = "HeRo, 2026"

    def __init__(
        self,
        *,
        sparsity: Sparsity,
        first_layer: Annotated[int, Ge(-1)] = -1,
        share: Annotated[float, Gt(0.0), Le(1.0)] = 0.9,
        adapter_width: Natural = 0,
        output: Literal["scaled", "whole"] = "scaled",
        start: Start = "published",
        train: Literal["none", "adapters", "end_to_end"] = "end_to_end",
        training: Training = TRAINING,
        depth_weight: NonNegative = 1e-3,
    ) -> None:
        super().__init__(
            first_layer=first_layer,
            share=share,
            sparsity=sparsity,
            routers=Routers(),
            adapters=PerSite(
                lambda shape: NarrowFFN(
                    width=shape.width, hidden=adapter_width or 7 * shape.width // 32, kind="silu"
                )
            ),
            output=output,
            start=start,
            depth_weight=depth_weight,
            training=grouped(training, TRAINING),
        )
        self.history: HistoryEncoder | None = None
        self.train_what = train

    def setup(self, shape: Shape) -> None:
        self.history = HistoryEncoder(width=shape.width, layers=shape.layers)
        super().setup(shape)
        if self.start_what == "closed_form":
            nn.init.zeros_(self.history.head.weight)
            nn.init.zeros_(self.history.head.bias)

    def score(self, site: Site, x_BTD: Tensor, ctx: RouteContext) -> Tensor:
        assert self.history is not None, "setup() comes first"
        logit, path = self.history(site.layer, ctx.residual_BTD, ctx.memory.get("path"))
        ctx.memory["path"] = path
        return logit + self.routers(site, unit_rms(ctx.residual_BTD.float()))

    def read_unit(self, view: UnitView) -> Tensor:
        return unit_rms(view.residual_ND.float())

    def stages(self, budget: Budget) -> Iterable[Stage]:
        if self.start_what == "closed_form":
            yield from self.closed_form_stages(budget)
        if self.train_what == "adapters":
            yield self.adapter_stage(budget)
        elif self.train_what == "end_to_end":
            parts = [self.routers, self.adapters, self.history]
            yield self.train_stage("train", parts, budget.routers)

    def cost(self, site: Site) -> SiteCost:
        assert self.history is not None, "setup() comes first"
        shared = sum(p.numel() for p in self.history.parameters() if p.dim() == 2)
        width, cost = self.history.query.in_features, super().cost(site)
        return replace(cost, route=cost.route + 2.0 * shared + 5.0 * width * width)
