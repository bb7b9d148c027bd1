"""SkipGPT: each token skips attention and MLP units that its router finds dispensable."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from torch import Tensor

from methods.base import Budget, RouteContext, RoutedView, Site, Stage
from methods.options import (
    LoraSpec,
    Natural,
    NonNegative,
    Positive,
    RouterKind,
    Sparsity,
    lora_spec,
)
from methods.parts.gates import anneal, gumbel_gate
from methods.parts.penalties import sparsity_penalty
from methods.parts.routed_method import RoutedMethod, lora_stage
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
        super().__init__(sparsity=sparsity, routers=routers)
        self.train_what, self.router_lr = train, router_lr
        self.tau_start, self.tau_end = tau_start, tau_end
        self.penalty_weight = penalty_weight
        self.lora, self.lora_lr = lora_spec(lora), lora_lr

    def score(self, site: Site, x_BTD: Tensor, ctx: RouteContext) -> Tensor:
        if site.kind == "attention":
            ctx.memory["layer_input"] = ctx.residual_BTD
        scores: Tensor = self.routers(site, ctx.memory["layer_input"])
        return scores

    def gate(self, logits_BT: Tensor, ctx: RouteContext) -> Tensor:
        return gumbel_gate(logits_BT, tau=anneal(self.tau_start, self.tau_end, ctx.anneal))

    def stages(self, budget: Budget) -> Iterable[Stage]:
        if self.train_what == "routers":
            yield self.train_stage(
                "routers", self._routed_loss, [self.routers], budget.routers, lr=self.router_lr
            )
        if self.lora is not None:
            yield lora_stage(self.lora, budget.lora, lr=self.lora_lr)

    def _routed_loss(self, view: RoutedView) -> Tensor:
        penalty = sparsity_penalty(view.execute_rate, view.sparsity, weight=self.penalty_weight)
        return view.task_loss + penalty
