"""SkipGPT: each token skips attention and MLP units that its router finds dispensable."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from torch import Tensor

from methods.base import Budget, RouteContext, Site, Stage
from methods.options import LoraSpec, Natural, NonNegative, Positive, RouterKind, Sparsity, Training
from methods.parts.routed_method import RoutedMethod
from methods.parts.routers import Routers


class SkipGPT(RoutedMethod):
    """Execute-or-skip with separate attention and MLP routers (Zhao et al., ICML 2025).

    Both routers of a layer read the un-normalised residual stream that enters the *layer*, so
    that both decisions are known before its attention runs. Router tuning with a frozen backbone,
    then LoRA with frozen routers on the task loss alone.

    Args:
        router: `linear` (paper: D -> 2) or `mlp` (published code: D -> D/4 -> ReLU -> 2).
        router_width: hidden width of `mlp`; 0 means D // 4.
        train: `routers`, or `none` for random routers.
        router_lr: of router tuning, constant (paper: 2e-3).
        tau_start: Gumbel temperature at the stage's first step, then linear (5).
        tau_end: at its last (1).
        penalty_weight: of |(1 - s) - mean execute rate| (paper 8, published code 20).
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
        train: Literal["none", "routers"] = "routers",
        router_lr: Positive = 2e-3,
        tau_start: Positive = 5.0,
        tau_end: Positive = 1.0,
        penalty_weight: NonNegative = 8.0,
        lora: LoraSpec | None = None,
        lora_lr: Positive = 2e-4,
    ) -> None:
        routers = Routers(kind=router, hidden=router_width, outputs=2)
        training = Training(
            lr=router_lr, tau_start=tau_start, tau_end=tau_end, penalty_weight=penalty_weight
        )
        super().__init__(
            sparsity=sparsity, routers=routers, training=training, lora=lora, lora_lr=lora_lr
        )
        self.train_what = train

    def score(self, site: Site, x_BTD: Tensor, ctx: RouteContext) -> Tensor:
        if site.kind == "attention":
            ctx.memory["layer_input"] = ctx.residual_BTD
        scores: Tensor = self.routers(site, ctx.memory["layer_input"])
        return scores

    def stages(self, budget: Budget) -> Iterable[Stage]:
        if self.train_what == "routers":
            yield self.train_stage("routers", [self.routers], budget.routers)
        yield from self.lora_stages(budget)
