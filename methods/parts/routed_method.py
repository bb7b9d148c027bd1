"""What methods with a router at each site have in common, written once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from methods.base import (
    Budget,
    Decision,
    LinearUnit,
    Method,
    Probe,
    RouteContext,
    RoutedView,
    Shape,
    Site,
    SiteCost,
    Stage,
    StageBudget,
    UnitView,
)
from methods.options import KVPolicy, LoraSpec, RouterOptions, Sparsity, Training, grouped
from methods.parts.forecaster import Forecasters
from methods.parts.gates import gumbel_gate
from methods.parts.keys import KeyForecasts
from methods.parts.penalties import sparsity_penalty
from methods.parts.router_start import fit_recoverability, shift_stage
from methods.parts.routers import PerSite

TRAINING = Training()
CLOSED_FORM = RouterOptions(kind_shift=True)
"""The start that informed routing gets, of a method that has no options of its own for it."""
DAMPING = 1e-3
"""Of that start's regressions, relative to the mean variance of what they read."""


class RoutedMethod(Method):
    """Routers score every token at every site; a bypassed one gets an estimate, or nothing.

    The level between the contract and a paper. A method hands its routers to the constructor and
    overrides `score` where they read something else than the unit's normalised input, `gate` for
    what carries the gradient in training, `_routed_loss` for what is minimised, `bypasses` for what
    a bypassed token gets, and `stages` for the recipe.

    Args:
        routers: of each site; None for a method that scores without parameters.
        forecasters: of each site.
        training: of the gradient stage.
        targets: train one model for these sparsities in turn, shared by all points of a sweep;
            empty trains for the point's own.
        lora: of the backbone; None for none, `{}` for the published adapters.
        lora_lr: of a stage of adapters alone.
        kv_policy: where the method offers more than its class's.
    """

    def __init__(
        self,
        *,
        sparsity: Sparsity,
        routers: PerSite[Any] | None = None,
        forecasters: Forecasters | None = None,
        training: Training = TRAINING,
        targets: Sequence[Sparsity] = (),
        lora: LoraSpec | None = None,
        lora_lr: float = 2e-4,
        kv_policy: KVPolicy | None = None,
    ) -> None:
        super().__init__(sparsity=sparsity)
        self.routers = PerSite[Any]() if routers is None else routers
        self.forecasters = forecasters
        self.keys: KeyForecasts | None = None
        self.kv_policy = kv_policy or self.kv_policy
        if kv_policy == "forecast" and forecasters is not None:
            self.keys = KeyForecasts(forecasters)
        self.training_options, self.targets = training, tuple(targets)
        self.lora, self.lora_lr = None if lora is None else grouped(lora, LoraSpec()), lora_lr

    def setup(self, shape: Shape) -> None:
        super().setup(shape)
        for part in self.children():
            if isinstance(part, PerSite):
                part.create(self.sites(), shape)

    @property
    def bypasses(self) -> PerSite[Any] | None:
        """What a bypassed token gets at each site; None is nothing."""
        return self.forecasters

    def score(self, site: Site, x_BTD: Tensor, ctx: RouteContext) -> Tensor:
        """Score tokens, float32 [B, T], high where they should execute."""
        scores: Tensor = self.routers(site, x_BTD)
        return scores

    def read_unit(self, view: UnitView) -> Tensor:
        """Give what the router reads of a unit under the dense forward, [N, D]: its input."""
        return view.x_ND

    def gate(self, logits_BT: Tensor, ctx: RouteContext) -> Tensor:
        """Turn score - threshold into a gate of 0 and 1 that carries the gradient of training.

        By default a Gumbel sample, its temperature falling linearly (informed, SkipGPT, D-LLM).
        """
        return gumbel_gate(logits_BT, tau=self.training_options.tau(ctx.anneal))

    def route(self, site: Site, x_BTD: Tensor, ctx: RouteContext) -> Decision:
        scores = self.score(site, x_BTD, ctx)
        if not ctx.training:
            return self.decide(scores)
        gate = self.gate(scores - self.threshold, ctx)
        return Decision(gate > 0.5, gate, scores)

    def approximate(self, site: Site, x_BTD: Tensor) -> Tensor | None:
        return None if self.bypasses is None else self.bypasses(site, x_BTD)

    def forecast_keys(self, site: Site, x_BTD: Tensor) -> Tensor | None:
        return None if self.keys is None else self.keys(site, x_BTD)

    def linear_unit(self, site: Site) -> LinearUnit | None:
        """`linear` of a router that reads the unit's normalised input and a forecaster, or skip.

        None if either is more than a linear score and two maps. Without a router no token executes.
        """
        score: tuple[Tensor, Tensor] | None = self._never
        if site in self.routers:
            score = self.routers.at(site).linear()
        forecaster = None if self.bypasses is None else self.bypasses.at(site)
        if score is None or forecaster is None:
            return None if score is None else LinearUnit(*score)
        if forecaster.neurons is not None:
            return None
        down, up = forecaster.down, forecaster.up
        silu = isinstance(forecaster.activation, nn.SiLU)
        return LinearUnit(*score, down.weight, down.bias, up.weight, up.bias, silu)

    @property
    def _never(self) -> tuple[Tensor, Tensor]:
        """A linear score below every threshold."""
        assert self.shape is not None, "setup() comes first"
        never = torch.full_like(self.threshold, -math.inf)
        return never.new_zeros(self.shape.width), never

    def cost(self, site: Site) -> SiteCost:
        estimate = 0.0 if self.bypasses is None else self.bypasses.flops_per_token(site)
        stored = 0.0
        if self.keys is not None:
            estimate, stored = estimate + self.keys.flops_per_token(site), self.keys.stored(site)
        return SiteCost(self.routers.flops_per_token(site), estimate, stored)

    def start_stages(
        self,
        options: RouterOptions,
        budget: Budget,
        *,
        damping: float,
        missed_by: PerSite[Any] | None,
        per_flop: bool = False,
        scale: float = 1.0,
    ) -> Iterable[Stage]:
        """The start without a gradient: forecasters, routers, their kinds' shift, keys and values.

        Args:
            damping: of the routers' regression.
            missed_by: whose error the routers regress; None for a skip's, the unit's output.
            per_flop: compare units by harm per FLOP that a bypass saves, not by harm.
            scale: of the scores.
        """
        if self.forecasters is not None:
            yield self.forecasters.stage(budget.forecasters, self._solve)
        if options.start == "recoverability":

            def fit(probe: Probe) -> None:
                how: dict[str, Any] = {"sensitivity": options.sensitivity, "scale": scale}
                if per_flop:
                    how["saves"] = partial(self._saves, keys=probe.row / 2)
                fit_recoverability(
                    probe, self.routers, missed_by, damping=damping, read=self.read_unit, **how
                )

            features = [self.routers.at(site).read_by_head for site in self.sites()]
            held = 8 * sum(number**2 for number in features)  # a square matrix of doubles a site
            yield Stage("router_start", fit=fit, fit_bytes=held)
            if options.kind_shift:
                own = (self.routers, self.threshold, self.targets, self.sparsity)
                yield shift_stage(*own, per_flop=per_flop, scale=scale)
        if self.keys is not None:
            yield self.keys.stage("keys")

    def closed_form_stages(self, budget: Budget, scale: float = 1.0) -> Iterable[Stage]:
        """`start_stages` of a baseline with `start=closed_form`.

        Args:
            scale: of the scores: how loud they are beside the noise of a gate that samples.
        """
        missed_by = self.bypasses
        yield from self.start_stages(
            CLOSED_FORM, budget, damping=DAMPING, missed_by=missed_by, scale=scale
        )

    def train_stage(
        self, name: str, parts: Iterable[nn.Module | None], budget: StageBudget, **how: Any
    ) -> Stage:
        """The gradient stage, for the point's target or for each of `targets` in turn.

        Args:
            parts: whose parameters it moves.
            how: further fields of `Stage`.
        """
        parameters = [p for part in parts if part is not None for p in part.parameters()]
        own = self.training_options.optimizer()
        own |= {"per_target": not self.targets, "targets": self.targets, "loss": self._routed_loss}
        return Stage(name, parameters=parameters, budget=budget, **{**own, **how})

    def _routed_loss(self, view: RoutedView) -> Tensor:
        """Task loss + weight |(1 - s) - mean execute rate| (informed routing, SkipGPT)."""
        weight = self.training_options.penalty_weight
        return view.task_loss + sparsity_penalty(view.execute_rate, view.sparsity, weight=weight)

    def lora_stages(self, budget: Budget) -> Iterable[Stage]:
        """Adapters of the backbone alone, on hard decisions at the threshold of each target.

        Published (informed routing and SkipGPT, stage 3): rank 16, alpha 32, dropout 0.1 on q, v
        and gate, learning rate 2e-4, cosine with a tenth of warm-up. There the routers sample
        Gumbel noise meanwhile; here they decide as they will at inference.
        """
        if self.lora is None:
            return
        yield Stage(
            "lora",
            loss=lambda view: view.task_loss,
            lora=self.lora,
            hard=True,
            budget=budget.lora,
            lr=self.lora_lr,
            schedule="cosine",
            warmup=0.1,
            per_target=not self.targets,
            targets=self.targets,
        )

    def _saves(self, site: Site, keys: float) -> float:
        """Count the FLOPs per token that a bypass of a site saves, less those of its estimate."""
        assert self.shape is not None, "setup() comes first"
        return self.shape.bypass_flops(site, keys) - self.cost(site).approximate

    def _solve(self, probe: Probe) -> None:
        assert self.forecasters is not None
        self.forecasters.solve(probe)
        if self.keys is not None:
            self.keys.follow()  # ranks may have moved between the units
