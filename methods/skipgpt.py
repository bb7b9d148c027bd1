"""SkipGPT: each token skips attention and MLP units that its router finds dispensable."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from torch import Tensor

from methods.base import Budget, RouteContext, Site, Stage, UnitView
from methods.options import (
    LoraSpec,
    Natural,
    Positive,
    RouterKind,
    Sparsity,
    Start,
    Training,
    grouped,
)
from methods.parts.routed_method import RoutedMethod
from methods.parts.routers import Routers

TRAINING = Training()


class SkipGPT(RoutedMethod):
    """Execute-or-skip with separate attention and MLP routers (Zhao et al., ICML 2025).

    Both routers of a layer read the un-normalised residual stream that enters the *layer*, so
    that both decisions are known before its attention runs. Router tuning with a frozen backbone,
    then LoRA with frozen routers on the task loss alone.

    Args:
        router: `linear` (paper: D -> 2) or `mlp` (published code: D -> D/4 -> ReLU -> 2).
        router_width: hidden width of `mlp`; 0 means D // 4.
        start: `published`, or `closed_form`: routers as the regression of what a skip would miss.
        scale: of the scores of that start: how loud they are beside the Gumbel noise.
        train: `routers`, or `none` for the start alone.
        training: `Training`, of the routers (paper: lr 2e-3, constant, Gumbel temperature 5 to 1,
            penalty weight 8; published code 20).
        lora: of the second stage (`LoraSpec` fields), or None for router tuning alone.
        lora_lr: its learning rate.
    """

    paper = "SkipGPT, ICML 2025"

    def __init__(
        self,
        *,
        sparsity: Sparsity,
        router: RouterKind = "linear",
        router_width: Natural = 0,
        start: Start = "published",
        scale: Positive = 1.0,
        train: Literal["none", "routers"] = "routers",
        training: Training = TRAINING,
        lora: LoraSpec | None = None,
        lora_lr: Positive = 2e-4,
    ) -> None:
        routers = Routers(kind=router, hidden=router_width, outputs=2)
        super().__init__(
            sparsity=sparsity,
            routers=routers,
            training=grouped(training, TRAINING),
            lora=lora,
            lora_lr=lora_lr,
        )
        self.start_what, self.scale, self.train_what = start, scale, train

    def score(self, site: Site, x_BTD: Tensor, ctx: RouteContext) -> Tensor:
        if site.kind == "attention":
            ctx.memory["layer_input"] = ctx.residual_BTD
        scores: Tensor = self.routers(site, ctx.memory["layer_input"])
        return scores

    def read_unit(self, view: UnitView) -> Tensor:
        assert view.layer_input_ND is not None
        return view.layer_input_ND

    def stages(self, budget: Budget) -> Iterable[Stage]:
        if self.start_what == "closed_form":
            yield from self.closed_form_stages(budget, self.scale)
        if self.train_what == "routers":
            yield self.train_stage("routers", [self.routers], budget.routers)
        yield from self.lora_stages(budget)
