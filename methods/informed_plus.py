"""Informed routing, extended: a closed-form start, then distillation of the whole routed model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

from torch import Tensor

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
    middle,
)
from methods.parts.balance import shift_kinds, shift_stage
from methods.parts.closed_form import refit_on_routed
from methods.parts.forecaster import Forecasters
from methods.parts.gates import sigmoid_gate
from methods.parts.inputs import RouterInput
from methods.parts.keys import KeyForecasts
from methods.parts.linear import linear_unit
from methods.parts.lora import lora_spec, lora_stage
from methods.parts.penalties import sparsity_penalty
from methods.parts.recoverability import fit_recoverability
from methods.parts.routers import Routers

Part = Literal[
    "closed_form",
    "neurons",
    "sensitivity",
    "code_norm",
    "kind_shift",
    "allocation",
    "distillation",
    "controller",
]
Train = Literal["forecasters", "end_to_end"]


class InformedPlus(Method):
    """Informed routing (arXiv 2510.13831) with what survived ablation; ours, not the paper's.

    1. Forecasters in closed form: a few of an MLP's own neurons, and the reduced-rank ridge
       regression of what they leave of the unit's output.
    2. Recoverability routers: ridge regression of the log of the forecast's error, weighted by the
       unit's loss sensitivity, so that one global threshold spends the budget where it matters;
       they also read the log norm of the forecaster's bottleneck, which says more about an MLP's
       error than a linear map of its input. MLP scores are then shifted against attention's to
       where the routed model loses least.
    3. Distillation of the forecasters in the routed model: KL to the dense model's distributions, a
       controller that holds the realised sparsity at the target. The routers stay as they are:
       trained along (`train=end_to_end`), they undo more than they bring.

    `experiment=ablation` leaves out one part at a time, at one budget.

    Args:
        without: parts to leave out. `closed_form`: random forecasters and routers (published
            initialisation); `neurons`: all forecasts are linear; `sensitivity`: of the
            routers' regression; `code_norm`: of their input; `kind_shift`: the MLP scores'
            shift; `allocation`: every unit gets the same rank; `distillation`, the
            gradient stage; `controller`: the threshold stays where calibration put it.
        rank: of the forecasters, their mean over the units.
        neurons: of each MLP's own, those that its forecaster keeps.
        refit: before the distillation, solve forecasters again on the stream that forecasts
            upstream have changed, and routers for them; it costs more than it brings.
        targets: one budget-conditional training for these sparsities in turn; empty trains for the
            point's own.
        train: what the distillation moves: `forecasters`, which need no unit that a token
            bypasses, or `end_to_end`, the routers too, by straight-through sigmoid gates (always,
            where they start at random).
        train_lr: share of a parameter's root mean square that a step may move it.
        tau: temperature of the gates' gradient, `end_to_end` only.
        hold: gain of the threshold controller.
        penalty_weight: of |(1 - s) - mean execute rate|.
        lora: options of `LoraSpec` for a fine-tuning stage at the end; None for none.
        lora_lr: of that stage.
        kv_policy: `keep`, `evict` or `forecast`.
    """

    paper = "extends arXiv 2510.13831"

    def __init__(
        self,
        *,
        sparsity: float,
        without: Sequence[Part] = (),
        rank: int = 128,
        neurons: int = 256,
        damping: float = 1e-3,
        refit: bool = False,
        targets: Sequence[float] = (),
        train: Train = "forecasters",
        train_lr: float = 0.002,
        tau: float = 1.0,
        hold: float = 0.5,
        penalty_weight: float = 0.0,
        lora: Mapping[str, Any] | None = None,
        lora_lr: float = 2e-4,
        kv_policy: KVPolicy = "keep",
    ) -> None:
        super().__init__(sparsity=sparsity)
        if unknown := sorted(set(without) - set(get_args(Part))):
            raise ValueError(f"no such part: {unknown}; known: {', '.join(get_args(Part))}")
        self.parts = frozenset(get_args(Part)) - frozenset(without)
        if train not in get_args(Train):
            raise ValueError(f"train must be forecasters or end_to_end, not {train!r}")
        self.end_to_end = train == "end_to_end" or "closed_form" not in self.parts
        if neurons < 0:
            raise ValueError(f"neurons must be at least 0, not {neurons}")
        allocate = {"allocation", "closed_form"} <= self.parts
        self.forecasters = Forecasters(rank=rank, damping=damping, allocate=allocate)
        self.neurons = neurons if "neurons" in self.parts else 0
        self.router_input = RouterInput(
            source="post_norm",
            features=("code_norm",) if "code_norm" in self.parts else (),
            forecasters=self.forecasters,
        )
        self.routers = Routers(kind="linear", outputs=1)
        self.damping, self.targets = damping, tuple(targets)
        self.refit = refit
        self.train_lr, self.tau = train_lr, tau
        self.hold = hold if "controller" in self.parts else 0.0
        self.penalty_weight = penalty_weight
        self.lora, self.lora_lr = lora_spec(lora), lora_lr
        self.kv_policy = kv_policy
        self.keys: KeyForecasts | None = None
        if kv_policy == "forecast":
            self.keys = KeyForecasts(self.forecasters, damping=damping)

    def setup(self, shape: Shape) -> None:
        super().setup(shape)
        self.routers.create(self.sites(), self.router_input.create(self.sites(), shape.width))
        neurons = min(self.neurons, shape.mlp_width)
        self.forecasters.create(self.sites(), shape.width, neurons)
        if self.keys is not None:
            self.keys.create(self.sites(), shape)

    def adopt(self, shapes: Mapping[str, Sequence[int]]) -> None:
        self.forecasters.adopt(shapes, "forecasters.")
        if self.keys is not None:
            self.keys.adopt()

    def route(self, site: Site, x_BTD: Tensor, ctx: RouteContext) -> Decision:
        scores = self.routers(site, self.router_input(site, x_BTD, ctx.residual_BTD))
        if not ctx.training:
            return self.decide(scores)
        gate = sigmoid_gate(scores - self.threshold, tau=self.tau)
        return Decision(gate > 0.5, gate, scores)

    def approximate(self, site: Site, x_BTD: Tensor) -> Tensor | None:
        return self.forecasters(site, x_BTD)

    def linear(self, site: Site) -> LinearUnit | None:
        if not self.router_input.plain:
            return None
        return linear_unit(self.routers, self.forecasters, site)

    def forecast_keys(self, site: Site, x_BTD: Tensor) -> Tensor | None:
        return None if self.keys is None else self.keys(site, x_BTD)

    def stages(self, budget: Budget) -> Iterable[Stage]:
        if "closed_form" in self.parts:
            yield self.forecasters.stage(budget.forecasters)
            yield Stage("router_start", fit=self._start_routers)
            if "kind_shift" in self.parts:
                yield shift_stage(self.routers, self.threshold, self.targets, self.sparsity)
            if self.refit:
                yield Stage("refit", fit=self._refit, per_target=not self.targets)
        if self.keys is not None:
            yield self.keys.stage("keys", per_target=not self.targets)
        if "distillation" in self.parts:
            trained = list(self.forecasters.parameters())
            if self.end_to_end:
                trained += self.routers.parameters()
            yield Stage(
                "distill",
                loss=self._loss,
                parameters=trained,
                hard=not self.end_to_end,
                budget=budget.routers,
                lr=self.train_lr,
                relative_lr=True,
                schedule="cosine",
                warmup=0.1,
                weight_decay=0.0,
                betas=(0.9, 0.95),
                hold=self.hold,
                per_target=not self.targets,
                targets=self.targets,
                calibrate_first=True,
            )
            if self.keys is not None:
                yield self.keys.stage("keys_again", per_target=not self.targets)
        if self.lora is not None:
            yield lora_stage(self.lora, budget.lora, lr=self.lora_lr, targets=self.targets)

    def cost(self, site: Site) -> SiteCost:
        route = self.routers.at(site).flops_per_token + self.router_input.cost(site)
        estimate = self.forecasters.flops_per_token(site)
        if self.keys is None:
            return SiteCost(route, estimate)
        return SiteCost(route, estimate + self.keys.flops_per_token(site), self.keys.stored(site))

    def _start_routers(self, probe: Probe) -> None:
        fit_recoverability(
            probe,
            self.routers,
            self.forecasters,
            damping=self.damping,
            sensitivity="sensitivity" in self.parts,
            inputs=self.router_input,
        )

    def _refit(self, probe: Probe) -> None:
        """At the point's target, or at the middle one of a budget-conditional training."""
        self.calibrate(probe, middle(self.targets, self.sparsity))
        refit_on_routed(probe, self.forecasters, damping=self.damping)
        self._start_routers(probe)
        if "kind_shift" in self.parts:
            shift_kinds(probe, self.routers, self.threshold, middle(self.targets, self.sparsity))

    def _loss(self, view: RoutedView) -> Tensor:
        penalty = sparsity_penalty(view.execute_rate, view.sparsity, weight=self.penalty_weight)
        return view.task_loss + penalty
