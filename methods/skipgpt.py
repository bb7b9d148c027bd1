"""SkipGPT: each token skips attention and MLP units that its router finds dispensable."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

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
from methods.parts.gates import anneal, gumbel_gate
from methods.parts.lora import lora_spec, lora_stage
from methods.parts.penalties import sparsity_penalty
from methods.parts.routers import RouterKind, Routers


class SkipGPT(Method):
    """Execute-or-skip with separate attention and MLP routers (Zhao et al., ICML 2025).

    Both routers of a layer read the un-normalised residual stream that enters the *layer*, so
    that both decisions are known before its attention runs. Router tuning with a frozen backbone,
    then LoRA with frozen routers on the task loss alone. Scores are taken from a threshold that
    realises the target before the first step, so that no step is spent on finding the rate.

    Args:
        router: `linear` (paper: D -> 2) or `mlp` (published code: D -> D/4 -> ReLU -> 2).
        router_width: hidden width of `mlp`; 0 means D // 4.
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
        sparsity: float,
        router: RouterKind = "linear",
        router_width: int = 0,
        train: Literal["none", "routers"] = "routers",
        router_lr: float = 2e-3,
        tau_start: float = 5.0,
        tau_end: float = 1.0,
        penalty_weight: float = 8.0,
        lora: Mapping[str, Any] | None = None,
        lora_lr: float = 2e-4,
    ) -> None:
        super().__init__(sparsity=sparsity)
        self.routers = Routers(kind=router, hidden=router_width, outputs=2)
        self.train_what, self.router_lr = train, router_lr
        self.tau_start, self.tau_end = tau_start, tau_end
        self.penalty_weight = penalty_weight
        self.lora, self.lora_lr = lora_spec(lora), lora_lr

    def setup(self, shape: Shape) -> None:
        super().setup(shape)
        self.routers.create(self.sites(), shape.width)

    def route(self, site: Site, x_BTD: Tensor, ctx: RouteContext) -> Decision:
        if site.kind == "attention":
            ctx.memory["layer_input"] = ctx.residual_BTD
        scores = self.routers(site, ctx.memory["layer_input"])
        if not ctx.training:
            return self.decide(scores)
        tau = anneal(self.tau_start, self.tau_end, ctx.anneal)
        gate = gumbel_gate(scores - self.threshold, tau=tau)
        return Decision(gate > 0.5, gate, scores)

    def stages(self, budget: Budget) -> Iterable[Stage]:
        if self.train_what == "routers":
            yield Stage(
                "routers",
                loss=self._routed_loss,
                parameters=list(self.routers.parameters()),
                budget=budget.routers,
                lr=self.router_lr,
                per_target=True,
                calibrate_first=True,
            )
        if self.lora is not None:
            yield lora_stage(self.lora, budget.lora, lr=self.lora_lr)

    def cost(self, site: Site) -> SiteCost:
        return SiteCost(route=self.routers.at(site).flops_per_token)

    def _routed_loss(self, view: RoutedView) -> Tensor:
        penalty = sparsity_penalty(view.execute_rate, view.sparsity, weight=self.penalty_weight)
        return view.task_loss + penalty
