"""Informed routing: forecast a unit's output first, then execute it or keep the forecast."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from methods.base import Budget, Decision, LinearUnit, RouteContext, RoutedView, Site, Stage
from methods.options import (
    Count,
    ForecasterOptions,
    KVPolicy,
    LoraSpec,
    NonNegative,
    Positive,
    RouterOptions,
    Sparsity,
    Training,
    grouped,
)
from methods.parts.forecaster import Forecasters
from methods.parts.routed_method import RoutedMethod
from methods.parts.routers import PerSite, Routers

FORECASTER, ROUTER, TRAINING = ForecasterOptions(), RouterOptions(), Training()


class Informed(RoutedMethod):
    """Execute-or-approximate for every attention and MLP unit (Han et al., arXiv 2510.13831).

    A forecaster (LFF) estimates the unit's output from its normalised input; a router reads the
    same input and sends each token through the unit or gives it the estimate.

    Args:
        bypass: `forecast`, or `skip` for the ablation: the router still decides by how well the
            output could be forecast, but a bypassed token gets nothing.
        rank: of the forecasters (paper: 100 at D = 4096, saturating near 50).
        forecaster: `ForecasterOptions`: how they are fitted.
        router: `RouterOptions`: which router, and where it starts.
        train: what the gradient stage moves: `none`, `routers` (the paper's stage 2),
            `forecasters` under the routed forward, or `end_to_end` (both).
        targets: train one model for these sparsities in turn, shared by all points of a sweep;
            empty trains for the point's own.
        training: `Training`: the options of that stage (paper: lr 2e-3, constant).
        cosine_weight: of the published regulariser of routers in training, which makes it dear to
            bypass what turns the residual stream (published code: 0.1).
        lora: `LoraSpec` of the paper's optional stage 3; None for none.
        lora_lr: of that stage (paper: 2e-4, cosine).
        kv_policy: `keep` (bypassed tokens write K and V), `evict` (they do not) or `forecast` (a
            linear map of the forecaster's bottleneck estimates both).
    """

    paper = "arXiv 2510.13831"

    def __init__(
        self,
        *,
        sparsity: Sparsity,
        bypass: Literal["forecast", "skip"] = "forecast",
        rank: Count = 64,
        forecaster: ForecasterOptions = FORECASTER,
        router: RouterOptions = ROUTER,
        train: Literal["none", "forecasters", "routers", "end_to_end"] = "none",
        targets: Sequence[Sparsity] = (),
        training: Training = TRAINING,
        cosine_weight: NonNegative = 0.0,
        lora: LoraSpec | None = None,
        lora_lr: Positive = 2e-4,
        kv_policy: KVPolicy = "keep",
    ) -> None:
        router, forecaster = grouped(router, ROUTER), grouped(forecaster, FORECASTER)
        forecasters = Forecasters(rank=rank, options=forecaster)
        super().__init__(
            sparsity=sparsity,
            routers=Routers(kind=router.kind, hidden=router.width, outputs=2),
            forecasters=forecasters,
            training=grouped(training, TRAINING),
            targets=targets,
            lora=lora,
            lora_lr=lora_lr,
            kv_policy=kv_policy,
        )
        self.bypass, self.router, self.damping = bypass, router, forecaster.damping
        self.trains_routers = train in ("routers", "end_to_end")
        self.trains_forecasters = bypass == "forecast" and train in ("forecasters", "end_to_end")
        self.train_what, self.cosine_weight = train, cosine_weight

    @property
    def bypasses(self) -> PerSite[Any] | None:
        return self.forecasters if self.bypass == "forecast" else None

    def linear(self, site: Site) -> LinearUnit | None:
        return self.linear_unit(site)

    def route(self, site: Site, x_BTD: Tensor, ctx: RouteContext) -> Decision:
        decision = super().route(site, x_BTD, ctx)
        if ctx.training and self.cosine_weight:
            assert ctx.output is not None
            with torch.no_grad():
                after_BTD = ctx.residual_BTD + ctx.output()
                turn_BT = 1 - functional.cosine_similarity(ctx.residual_BTD, after_BTD, dim=-1)
            bypassed_BT = (1 - decision.gate_BT) * ctx.valid_BT
            turned = (turn_BT.float() * bypassed_BT).sum()
            decision.auxiliary = turned / (bypassed_BT.detach().sum() + 1)
        return decision

    def _routed_loss(self, view: RoutedView) -> Tensor:
        # published: the mean over layers of what attention and MLP give together
        return super()._routed_loss(view) + 2 * self.cosine_weight * view.auxiliary

    def stages(self, budget: Budget) -> Iterable[Stage]:
        """Forecasters, the routers' start, gradient training, then (optionally) LoRA."""
        damping, forecasters = self.damping, self.forecasters
        yield from self.start_stages(self.router, budget, damping=damping, missed_by=forecasters)
        trained: list[nn.Module] = [self.routers] if self.trains_routers else []
        if self.trains_forecasters and forecasters is not None:
            trained.append(forecasters)
        if trained:
            yield self.train_stage(
                f"train_{self.train_what}",
                trained,
                budget.routers,
                hard=not self.trains_routers,
            )
        if self.keys is not None and self.trains_forecasters:
            yield self.keys.stage("keys_again", per_target=not self.targets)
        yield from self.lora_stages(budget)
