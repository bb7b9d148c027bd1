"""DiffSkip: MLPs that a token may leave for an adapter, routed by what attention changed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

import torch
from torch import Tensor

from methods.base import Budget, RouteContext, RoutedView, Shape, Site, Stage, UnitView
from methods.options import Ge, Gt, Le, Natural, Sparsity, Start, Training, grouped
from methods.parts.narrow_ffn import NarrowFFN
from methods.parts.routed_method import RoutedMethod
from methods.parts.routers import PerSite, Routers
from methods.parts.trained_bypass import LaterMLPs

TRAINING = Training(lr=1e-4, schedule="cosine")


class DiffSkip(LaterMLPs):
    """Differential layer skipping (DiffSkip, Findings of ACL 2025, 377): attention always runs.

    The router of an MLP reads what the same layer's attention changed, relative to the size of the
    stream: it is known before the MLP, and where little came in, little is left to do. A bypassed
    token takes a narrow adapter. The backbone is frozen, and a penalty holds the executed share at
    the target. The gate is hard and its gradient that of the sigmoid (straight-through), where the
    paper takes SparseMixer's estimate of it, which samples.

    Args:
        first_layer: routed from here on; -1 is the latter half (published), or from as early as
            leaves each routed MLP at most `share` of its tokens to bypass.
        share: see `first_layer`.
        adapter_width: of the bypass, Linear(D, width) -> SiLU -> Linear(width, D); 0 means D // 8.
        start: `published`, or `closed_form`: adapters as forecasters of the MLPs, routers as the
            regression of their error.
        train: routers and adapters `end_to_end`, `adapters` alone on the decisions of inference, or
            `none` for what it starts with.
        training: `Training` of both; its `penalty_weight` is that of |(1 - s) - execute rate|.
    """

    paper = "ACL Findings 2025, 377"

    def __init__(
        self,
        *,
        sparsity: Sparsity,
        first_layer: Annotated[int, Ge(-1)] = -1,
        share: Annotated[float, Gt(0.0), Le(1.0)] = 0.9,
        adapter_width: Natural = 0,
        start: Start = "published",
        train: Literal["none", "adapters", "end_to_end"] = "end_to_end",
        training: Training = TRAINING,
    ) -> None:
        def adapter(shape: Shape) -> NarrowFFN:
            hidden = adapter_width or shape.width // 8
            return NarrowFFN(width=shape.width, hidden=hidden, kind="silu")

        super().__init__(
            first_layer=first_layer,
            share=share,
            sparsity=sparsity,
            routers=Routers(),
            adapters=PerSite(adapter),
            output="whole",
            start=start,
            depth_weight=0.0,
            training=grouped(training, TRAINING),
        )
        self.train_what = train

    def score(self, site: Site, x_BTD: Tensor, ctx: RouteContext) -> Tensor:
        assert ctx.layer_input_BTD is not None
        return self.routers(site, change(ctx.layer_input_BTD, ctx.residual_BTD))

    def read_unit(self, view: UnitView) -> Tensor:
        assert view.layer_input_ND is not None
        return change(view.layer_input_ND, view.residual_ND)

    def stages(self, budget: Budget) -> Iterable[Stage]:
        if self.start_what == "closed_form":
            yield from self.closed_form_stages(budget)
        if self.train_what != "none":
            routers = self.routers if self.train_what == "end_to_end" else None
            parts, hard = [routers, self.adapters], routers is None
            yield self.train_stage("train", parts, budget.routers, hard=hard)

    def _routed_loss(self, view: RoutedView) -> Tensor:
        return RoutedMethod._routed_loss(self, view)


def change(before: Tensor, after: Tensor) -> Tensor:
    """What was added to the stream, relative to its root mean square; float32 [..., D]."""
    stream = after.float()
    return (stream - before.float()) * torch.rsqrt(stream.square().mean(-1, keepdim=True) + 1e-6)
