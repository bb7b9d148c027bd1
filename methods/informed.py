"""Informed routing: forecast a unit's output first, then execute it or keep the forecast."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from torch import Tensor, nn

from methods.base import (
    Budget,
    Decision,
    Method,
    Probe,
    RouteContext,
    RoutedView,
    Shape,
    Site,
    SiteCost,
    Stage,
)
from methods.parts.forecaster import Activation, Fit, Forecasters
from methods.parts.gates import anneal, gumbel_gate, sigmoid_gate
from methods.parts.penalties import sparsity_penalty
from methods.parts.recoverability import fit_recoverability
from methods.parts.routers import RouterKind, Routers

Gate = Literal["gumbel", "sigmoid"]
Train = Literal["none", "forecasters", "routers", "end_to_end"]


class Informed(Method):
    """Execute-or-approximate for every attention and MLP unit (Han et al., arXiv 2510.13831).

    A forecaster (LFF) estimates the unit's output from its normalised input; a router reads the
    same input and sends each token through the unit or gives it the estimate.

    Args:
        bypass: `forecast`, or `skip` for the ablation without forecasters.
        rank: of the forecasters (paper: 100 at D = 4096, saturating near 50).
        forecaster_fit: `closed_form` (one dense pass) or `sgd` (the paper's stage 1).
        activation: inside the forecasters; None is `identity` for the closed form, the paper's
            `silu` for `sgd`.
        forecaster_lr: of `sgd`.
        router: `linear`, or the published `mlp` (D -> width -> ReLU -> 2).
        router_width: hidden width of `mlp`; 0 means D // 4.
        router_start: `recoverability` (regression of the forecast's error, no gradient) or
            `none` (the paper's random start).
        sensitivity: weight the regression by each unit's loss sensitivity.
        train: what the gradient stage moves: `none`, `routers` (the paper's stage 2),
            `forecasters` under the routed forward, or `end_to_end` (both).
        targets: train one model for these sparsities in turn, shared by all points of a sweep;
            empty trains for the point's own.
        gate: training gate; `gumbel` samples (paper), `sigmoid` does not.
        tau_start, tau_end: gate temperature, linear over the stage (paper: 5 to 1).
        train_lr: of the gradient stage (paper: 2e-3, constant).
        weight_decay: of its AdamW.
        schedule: of its learning rate.
        penalty_weight: of |(1 - s) - mean execute rate| (paper: 8).
    """

    paper = "arXiv 2510.13831"

    def __init__(
        self,
        *,
        sparsity: float,
        bypass: Literal["forecast", "skip"] = "forecast",
        rank: int = 64,
        forecaster_fit: Fit = "closed_form",
        activation: Activation | None = None,
        forecaster_lr: float = 1e-3,
        damping: float = 1e-3,
        router: RouterKind = "linear",
        router_width: int = 0,
        router_start: Literal["recoverability", "none"] = "recoverability",
        sensitivity: bool = True,
        train: Train = "none",
        targets: Sequence[float] = (),
        train_lr: float = 2e-3,
        weight_decay: float = 0.01,
        gate: Gate = "gumbel",
        tau_start: float = 5.0,
        tau_end: float = 1.0,
        schedule: Literal["constant", "cosine"] = "constant",
        penalty_weight: float = 8.0,
    ) -> None:
        super().__init__(sparsity=sparsity)
        self.forecasters: Forecasters | None = None
        if bypass == "forecast":
            self.forecasters = Forecasters(
                rank=rank,
                fit=forecaster_fit,
                activation=activation,
                damping=damping,
                lr=forecaster_lr,
            )
        self.routers = Routers(kind=router, hidden=router_width, outputs=2)
        self.damping, self.sensitivity = damping, sensitivity
        self.router_start, self.train_what, self.gate = router_start, train, gate
        self.tau_start, self.tau_end = tau_start, tau_end
        self.train_lr, self.schedule, self.weight_decay = train_lr, schedule, weight_decay
        self.targets, self.penalty_weight = tuple(targets), penalty_weight

    def setup(self, shape: Shape) -> None:
        super().setup(shape)
        self.routers.create(self.sites(), shape.width)
        if self.forecasters is not None:
            self.forecasters.create(self.sites(), shape.width)

    def route(self, site: Site, x_BTD: Tensor, ctx: RouteContext) -> Decision:
        scores = self.routers(site, x_BTD)
        if not ctx.training or self.train_what == "forecasters":
            return self.decide(scores)
        tau = anneal(self.tau_start, self.tau_end, ctx.anneal)
        sample = gumbel_gate if self.gate == "gumbel" else sigmoid_gate
        gate = sample(scores - self.threshold, tau=tau)
        return Decision(gate > 0.5, gate, scores)

    def approximate(self, site: Site, x_BTD: Tensor) -> Tensor | None:
        return None if self.forecasters is None else self.forecasters(site, x_BTD)

    def stages(self, budget: Budget) -> Iterable[Stage]:
        """Forecasters, then the routers' start, then (optionally) gradient training."""
        if self.forecasters is not None:
            yield self.forecasters.stage(budget.forecasters)
        if self.router_start == "recoverability":
            yield Stage("router_start", fit=self._start_routers)
        if self.train_what != "none":
            yield Stage(
                f"train_{self.train_what}",
                loss=self._routed_loss,
                parameters=self._trained(),
                budget=budget.routers,
                lr=self.train_lr,
                schedule=self.schedule,
                weight_decay=self.weight_decay,
                per_target=not self.targets,
                targets=self.targets,
                calibrate_first=self.router_start == "recoverability",
            )

    def cost(self, site: Site) -> SiteCost:
        estimate = 0.0 if self.forecasters is None else self.forecasters.flops_per_token(site)
        return SiteCost(route=self.routers.at(site).flops_per_token, approximate=estimate)

    def _start_routers(self, probe: Probe) -> None:
        fit_recoverability(
            probe,
            self.routers,
            self.forecasters,
            damping=self.damping,
            sensitivity=self.sensitivity,
        )

    def _trained(self) -> list[nn.Parameter]:
        parts: list[nn.Module] = []
        if self.train_what in ("routers", "end_to_end"):
            parts.append(self.routers)
        if self.train_what in ("forecasters", "end_to_end") and self.forecasters is not None:
            parts.append(self.forecasters)
        return [parameter for part in parts for parameter in part.parameters()]

    def _routed_loss(self, view: RoutedView) -> Tensor:
        """Task loss + 8 |(1 - s) - mean execute rate| (section on router training)."""
        penalty = sparsity_penalty(view.execute_rate, view.sparsity, weight=self.penalty_weight)
        return view.task_loss + penalty
