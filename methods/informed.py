"""Informed routing: forecast a unit's output first, then execute it or keep the forecast."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from methods.base import (
    Budget,
    Decision,
    KVPolicy,
    LinearUnit,
    Method,
    Probe,
    RouteContext,
    RoutedView,
    Shape,
    Site,
    SiteCost,
    Stage,
)
from methods.parts.balance import balance_kinds, balanced_penalty, shift_stage
from methods.parts.closed_form import refit_on_routed
from methods.parts.forecaster import Activation, Fit, Forecasters, Loss
from methods.parts.gates import anneal, gumbel_gate, sigmoid_gate
from methods.parts.inputs import Feature, RouterInput, Source
from methods.parts.keys import KeyForecasts
from methods.parts.linear import linear_unit
from methods.parts.lora import lora_spec, lora_stage
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
        bypass: `forecast`, or `skip` for the ablation: the router still decides by how well the
            output could be forecast, but a bypassed token gets nothing.
        rank: of the forecasters (paper: 100 at D = 4096, saturating near 50).
        forecaster_fit: `closed_form` (one dense pass) or `sgd` (the paper's stage 1).
        activation: inside the forecasters; None is `identity` for the closed form, the paper's
            `silu` for `sgd`.
        forecaster_loss: of `sgd`: `smooth_l1` (published), `mse` or `cosine`.
        forecaster_lr: of `sgd`.
        refit: solve the forecasters again on what the calibrated router really bypasses: after
            router training, or before a stage that trains the forecasters.
        router: `linear`, or the published `mlp` (D -> width -> ReLU -> 2).
        router_width: hidden width of `mlp`; 0 means D // 4.
        router_input: `post_norm` (paper) or `residual`, the stream before the norm.
        router_features: further inputs, of `forecast_norm`, `code_norm` and `predicted_error`.
        router_start: `recoverability` (regression of the forecast's error, no gradient) or
            `none` (the paper's random start).
        sensitivity: weight the regression by each unit's loss sensitivity.
        kind_shift: after that start, move the MLP scores to where the routed model loses least.
        balanced: attention and MLP units bypass the same share of tokens.
        train: what the gradient stage moves: `none`, `routers` (the paper's stage 2),
            `forecasters` under the routed forward, or `end_to_end` (both).
        targets: train one model for these sparsities in turn, shared by all points of a sweep;
            empty trains for the point's own.
        gate: training gate; `gumbel` samples (paper), `sigmoid` does not.
        tau_start: gate temperature at the stage's first step, then linear (paper: 5).
        tau_end: at its last (paper: 1).
        train_lr: of the gradient stage (paper: 2e-3, constant).
        weight_decay: of its AdamW.
        schedule: of its learning rate.
        warmup: share of its steps with a linearly rising learning rate.
        penalty_weight: of |(1 - s) - mean execute rate| (paper: 8).
        lora: options of `LoraSpec` for the paper's optional stage 3; None for none.
        lora_lr: of that stage (paper: 2e-4, cosine).
        kv_policy: `keep` (bypassed tokens write K and V), `evict` (they do not) or `forecast` (a
            linear map of the forecaster's bottleneck estimates both).
    """

    paper = "arXiv 2510.13831"
    mlp_offset: Tensor

    def __init__(
        self,
        *,
        sparsity: float,
        bypass: Literal["forecast", "skip"] = "forecast",
        rank: int = 64,
        forecaster_fit: Fit = "closed_form",
        activation: Activation | None = None,
        forecaster_loss: Loss = "smooth_l1",
        forecaster_lr: float = 1e-3,
        damping: float = 1e-3,
        refit: bool = False,
        router: RouterKind = "linear",
        router_width: int = 0,
        router_input: Source = "post_norm",
        router_features: Sequence[Feature] = (),
        router_start: Literal["recoverability", "none"] = "recoverability",
        sensitivity: bool = True,
        kind_shift: bool = False,
        balanced: bool = False,
        train: Train = "none",
        targets: Sequence[float] = (),
        train_lr: float = 2e-3,
        weight_decay: float = 0.01,
        gate: Gate = "gumbel",
        tau_start: float = 5.0,
        tau_end: float = 1.0,
        schedule: Literal["constant", "cosine"] = "constant",
        warmup: float = 0.0,
        penalty_weight: float = 8.0,
        lora: Mapping[str, Any] | None = None,
        lora_lr: float = 2e-4,
        kv_policy: KVPolicy = "keep",
    ) -> None:
        super().__init__(sparsity=sparsity)
        if balanced and train != "none" and len(targets) > 1:
            raise ValueError("balanced training knows one target: set targets=[]")
        self.forecasters = Forecasters(
            rank=rank,
            fit=forecaster_fit,
            activation=activation,
            loss=forecaster_loss,
            damping=damping,
            lr=forecaster_lr,
        )
        self.router_input = RouterInput(
            source=router_input, features=router_features, forecasters=self.forecasters
        )
        self.routers = Routers(kind=router, hidden=router_width, outputs=2)
        self.register_buffer("mlp_offset", torch.zeros(()))
        self.bypass, self.damping, self.refit = bypass, damping, refit
        self.sensitivity, self.router_start, self.balanced = sensitivity, router_start, balanced
        self.train_what: Train = "none" if (bypass, train) == ("skip", "forecasters") else train
        self.kind_shift = kind_shift and router_start == "recoverability" and not balanced
        self.targets = tuple(targets)
        self.gate, self.tau_start, self.tau_end = gate, tau_start, tau_end
        self.train_lr, self.weight_decay = train_lr, weight_decay
        self.schedule, self.warmup = schedule, warmup
        self.penalty_weight = penalty_weight
        self.lora, self.lora_lr = lora_spec(lora), lora_lr
        self.kv_policy = kv_policy
        self.keys: KeyForecasts | None = None
        if kv_policy == "forecast":
            self.keys = KeyForecasts(self.forecasters, damping=damping)

    def setup(self, shape: Shape) -> None:
        super().setup(shape)
        self.routers.create(self.sites(), self.router_input.create(self.sites(), shape.width))
        self.forecasters.create(self.sites(), shape.width)
        if self.keys is not None:
            self.keys.create(self.sites(), shape)

    def route(self, site: Site, x_BTD: Tensor, ctx: RouteContext) -> Decision:
        scores = self.routers(site, self.router_input(site, x_BTD, ctx.residual_BTD))
        if self.balanced and site.kind == "mlp":
            scores = scores - self.mlp_offset
        if not ctx.training or self.train_what == "forecasters":
            return self.decide(scores)
        tau = anneal(self.tau_start, self.tau_end, ctx.anneal)
        sample = gumbel_gate if self.gate == "gumbel" else sigmoid_gate
        gate = sample(scores - self.threshold, tau=tau)
        return Decision(gate > 0.5, gate, scores)

    def approximate(self, site: Site, x_BTD: Tensor) -> Tensor | None:
        return self.forecasters(site, x_BTD) if self.bypass == "forecast" else None

    def forecast_keys(self, site: Site, x_BTD: Tensor) -> Tensor | None:
        return None if self.keys is None else self.keys(site, x_BTD)

    def linear(self, site: Site) -> LinearUnit | None:
        if self.balanced or not self.router_input.plain:
            return None
        forecasters = self.forecasters if self.bypass == "forecast" else None
        return linear_unit(self.routers, forecasters, site)

    def stages(self, budget: Budget) -> Iterable[Stage]:
        """Forecasters, the routers' start, gradient training, then (optionally) LoRA."""
        refit = Stage("refit", fit=self._refit, per_target=True)
        trains_forecasters = self.train_what in ("forecasters", "end_to_end")
        yield self.forecasters.stage(budget.forecasters)
        if self.router_start == "recoverability":
            yield Stage("router_start", fit=self._start_routers)
        if self.kind_shift:
            yield shift_stage(self.routers, self.threshold, self.targets, self.sparsity)
        if self.keys is not None:
            yield self.keys.stage("keys")
        if self.refit and trains_forecasters:
            yield refit
        if self.train_what != "none":
            yield Stage(
                f"train_{self.train_what}",
                loss=self._routed_loss,
                parameters=self._trained(),
                budget=budget.routers,
                lr=self.train_lr,
                schedule=self.schedule,
                warmup=self.warmup,
                weight_decay=self.weight_decay,
                hard=self.train_what == "forecasters",
                per_target=not self.targets,
                targets=self.targets,
                calibrate_first=self.router_start == "recoverability",
            )
        if self.refit and not trains_forecasters:
            yield refit
        if self.keys is not None and (self.refit or trains_forecasters):
            yield self.keys.stage("keys_again", per_target=self.refit or not self.targets)
        if self.lora is not None:
            yield lora_stage(self.lora, budget.lora, lr=self.lora_lr, targets=self.targets)

    def calibrate(self, probe: Probe, sparsity: float) -> float | None:
        if self.balanced and sparsity > 0.0:
            balance_kinds(probe, self.mlp_offset, sparsity)
        return super().calibrate(probe, sparsity)

    def cost(self, site: Site) -> SiteCost:
        route = self.routers.at(site).flops_per_token + self.router_input.cost(site)
        forecasts = self.bypass == "forecast"
        estimate = self.forecasters.flops_per_token(site) if forecasts else 0.0
        if self.keys is None:
            return SiteCost(route, estimate)
        return SiteCost(route, estimate + self.keys.flops_per_token(site), self.keys.stored(site))

    def _start_routers(self, probe: Probe) -> None:
        self.router_input.fit(probe, damping=self.damping)
        fit_recoverability(
            probe,
            self.routers,
            self.forecasters,
            damping=self.damping,
            sensitivity=self.sensitivity,
            inputs=self.router_input,
        )

    def _refit(self, probe: Probe) -> None:
        self.calibrate(probe, self.sparsity)
        refit_on_routed(probe, self.forecasters, damping=self.damping)

    def _trained(self) -> list[nn.Parameter]:
        parts: list[nn.Module] = []
        if self.train_what in ("routers", "end_to_end"):
            parts.append(self.routers)
        if self.train_what in ("forecasters", "end_to_end") and self.bypass == "forecast":
            parts.append(self.forecasters)
        return [parameter for part in parts for parameter in part.parameters()]

    def _routed_loss(self, view: RoutedView) -> Tensor:
        """Task loss + 8 |(1 - s) - mean execute rate| (section on router training)."""
        penalty = balanced_penalty if self.balanced else _penalty
        return view.task_loss + penalty(view, weight=self.penalty_weight)


def _penalty(view: RoutedView, *, weight: float) -> Tensor:
    return sparsity_penalty(view.execute_rate, view.sparsity, weight=weight)
