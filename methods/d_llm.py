"""D-LLM: each token decides block by block, and what it skips leaves the cache."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

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
from methods.parts.bottleneck import BottleneckRouter, biased_head
from methods.parts.gates import gumbel_gate
from methods.parts.lora import lora_spec
from methods.parts.penalties import token_rate_penalty
from methods.parts.per_site import PerSite


class DLLM(Method):
    """Dynamic blocks with KV eviction (Jiang et al., D-LLM, NeurIPS 2024).

    The router reads the residual stream that enters the block. A token that skips a block writes
    no keys and values there, and nobody attends to it. Routers and adapters are trained together
    under hard Gumbel samples at temperature 1; at inference softmax > 0.5 decides, which the
    calibrated threshold shifts to the target.

    Args:
        router_width: of the bottleneck; 0 means D // 8, its share at the published width.
        first_layer: blocks before it are never skipped.
        reserved: first tokens of a sequence that execute every block.
        train_lr: of routers and adapters; cosine with a fifth of warm-up.
        penalty_weight: of the L1 distance between each token's depth and the target; it rises
            as a quarter sine over the stage.
        lora: adapters trained with the routers (`LoraSpec` fields), or None.
    """

    paper = "D-LLM, NeurIPS 2024"
    kv_policy = "evict"

    def __init__(
        self,
        *,
        sparsity: float,
        router_width: int = 512,
        first_layer: int = 2,
        reserved: int = 2,
        train: Literal["none", "routers"] = "routers",
        train_lr: float = 2.8e-4,
        penalty_weight: float = 5.0,
        lora: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(sparsity=sparsity)
        if first_layer < 0 or reserved < 1:
            raise ValueError("d_llm needs first_layer >= 0 and reserved >= 1")
        self.first_layer, self.reserved = first_layer, reserved
        self.routers = PerSite(lambda width: _router(width, router_width or width // 8))
        self.train_what, self.train_lr = train, train_lr
        self.penalty_weight, self.lora = penalty_weight, lora_spec(lora)

    def setup(self, shape: Shape) -> None:
        super().setup(shape)
        self.routers.create(self.sites(), shape.width)

    def sites(self) -> Sequence[Site]:
        assert self.shape is not None, "setup() comes first"
        return [Site(layer, "block") for layer in range(self.first_layer, self.shape.layers)]

    def route(self, site: Site, x_BTD: Tensor, ctx: RouteContext) -> Decision:
        reserved_BT = ctx.positions_BT < self.reserved
        scores = self.routers(site, ctx.residual_BTD).masked_fill(reserved_BT, math.inf)
        if not ctx.training:
            return self.decide(scores)
        gate = gumbel_gate(scores - self.threshold, tau=1.0)
        return Decision(gate > 0.5, gate, scores)

    def stages(self, budget: Budget) -> Iterable[Stage]:
        if self.train_what == "none":
            return
        yield Stage(
            "train",
            loss=self._routed_loss,
            parameters=list(self.routers.parameters()),
            lora=self.lora,
            budget=budget.routers,
            lr=self.train_lr,
            schedule="cosine",
            warmup=0.2,
            weight_decay=0.02,
            betas=(0.9, 0.95),
            per_target=True,
        )

    def cost(self, site: Site) -> SiteCost:
        return SiteCost(route=self.routers.flops_per_token(site))

    def _routed_loss(self, view: RoutedView) -> Tensor:
        assert self.shape is not None and view.valid_BT is not None
        positions_BT = view.valid_BT.long().cumsum(1) - 1
        penalty = token_rate_penalty(
            {site: decision.gate_BT for site, decision in view.decisions.items()},
            view.valid_BT & (positions_BT >= self.reserved),
            view.sparsity,
            units=len(self.shape.units()),
            weight=self.penalty_weight * math.sin(math.pi / 2 * view.anneal),
        )
        return view.task_loss + penalty


def _router(width: int, hidden: int) -> BottleneckRouter:
    """Linear(D, r) -> RMSNorm -> SiLU -> Linear(r, 2); the bias favours execution."""
    head = biased_head(hidden, (0.1, 2.0))
    return BottleneckRouter(width=width, hidden=hidden, activation=nn.SiLU(), head=head, bias=True)
