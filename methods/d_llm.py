"""D-LLM: each token decides block by block, and what it skips leaves the cache."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from methods.base import Budget, RouteContext, RoutedView, Site, Stage, UnitView
from methods.options import LoraSpec, Natural, Positive, Sparsity, Start, Training, grouped
from methods.parts.penalties import token_rate_penalty
from methods.parts.routed_method import RoutedMethod
from methods.parts.routers import BottleneckRouter, PerSite

TRAINING = Training(
    lr=2.8e-4,
    schedule="cosine",
    warmup=0.2,
    weight_decay=0.02,
    betas=(0.9, 0.95),
    tau_start=1.0,
    tau_end=1.0,
    penalty_weight=5.0,
)


class DLLM(RoutedMethod):
    """Dynamic blocks with KV eviction (Jiang et al., D-LLM, NeurIPS 2024).

    The router reads the residual stream that enters the block. A token that skips a block writes
    no keys and values there, and nobody attends to it. Routers and adapters are trained together
    under hard Gumbel samples at temperature 1; at inference softmax > 0.5 decides, which the
    calibrated threshold shifts to the target.

    Args:
        router_width: of the bottleneck; 0 means D // 8, its share at the published width.
        first_layer: blocks before it are never skipped.
        start: `published`, or `closed_form`: routers as the regression of what the block adds.
        scale: of the scores of that start: how loud they are beside the Gumbel noise.
        train: `routers` (and adapters), or `none` for the start alone.
        training: `Training`, of routers and adapters; its `penalty_weight` is that of the L1
            distance between each token's depth and the target, and rises as a quarter sine.
        lora: adapters trained with the routers (`LoraSpec` fields), or None.
    """

    paper = "D-LLM, NeurIPS 2024"
    kv_policy = "evict"
    least_reserve = 2
    """Published: the first two tokens of a sequence execute every block."""

    def __init__(
        self,
        *,
        sparsity: Sparsity,
        router_width: Natural = 0,
        first_layer: Natural = 2,
        start: Start = "published",
        scale: Positive = 1.0,
        train: Literal["none", "routers"] = "routers",
        training: Training = TRAINING,
        lora: LoraSpec | None = None,
    ) -> None:
        routers = PerSite(lambda shape: _router(shape.width, router_width or shape.width // 8))
        training = grouped(training, TRAINING)
        super().__init__(sparsity=sparsity, routers=routers, training=training, lora=lora)
        self.start_what, self.scale = start, scale
        self.first_layer, self.train_what = first_layer, train

    def sites(self) -> Sequence[Site]:
        assert self.shape is not None, "setup() comes first"
        return [Site(layer, "block") for layer in range(self.first_layer, self.shape.layers)]

    def score(self, site: Site, x_BTD: Tensor, ctx: RouteContext) -> Tensor:
        scores: Tensor = self.routers(site, ctx.residual_BTD)
        return scores

    def read_unit(self, view: UnitView) -> Tensor:
        return view.residual_ND

    def stages(self, budget: Budget) -> Iterable[Stage]:
        if self.start_what == "closed_form":
            yield from self.closed_form_stages(budget, self.scale)
        if self.train_what == "routers":
            yield self.train_stage("train", [self.routers], budget.routers, lora=self.lora)

    def _routed_loss(self, view: RoutedView) -> Tensor:
        assert self.shape is not None and view.valid_BT is not None
        positions_BT = view.valid_BT.long().cumsum(1) - 1
        penalty = token_rate_penalty(
            {site: decision.gate_BT for site, decision in view.decisions.items()},
            view.valid_BT & (positions_BT >= self.reserved),
            view.sparsity,
            units=len(self.shape.units()),
            weight=self.training_options.penalty_weight * math.sin(math.pi / 2 * view.anneal),
        )
        return view.task_loss + penalty


def _router(width: int, hidden: int) -> BottleneckRouter:
    """Linear(D, r) -> RMSNorm -> SiLU -> Linear(r, 2); the bias favours execution."""
    head = nn.Linear(hidden, 2)
    with torch.no_grad():
        head.bias.copy_(torch.tensor((0.1, 2.0)))  # (bypass, execute), as published
    return BottleneckRouter(width=width, hidden=hidden, activation=nn.SiLU(), head=head, bias=True)
