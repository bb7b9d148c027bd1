"""Informed routing, extended: a closed-form start, then distillation of the whole routed model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from methods.base import Budget, LinearUnit, RouteContext, Site, SiteCost, Stage
from methods.options import (
    Count,
    ForecasterOptions,
    KVPolicy,
    LoraSpec,
    Natural,
    Positive,
    RouterOptions,
    Sparsity,
    Training,
    grouped,
)
from methods.parts.forecaster import Forecasters
from methods.parts.gates import sigmoid_gate
from methods.parts.routed_method import RoutedMethod
from methods.parts.router_start import EPSILON
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
TRAINING = Training(
    lr=0.002,
    relative_lr=True,
    schedule="cosine",
    warmup=0.1,
    weight_decay=0.0,
    betas=(0.9, 0.95),
    hold=0.5,
    tau_start=1.0,
    tau_end=1.0,
    penalty_weight=0.0,
)


class InformedPlus(RoutedMethod):
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
        damping: of the ridge regressions.
        targets: one budget-conditional training for these sparsities in turn; empty trains for the
            point's own.
        train: what the distillation moves: `forecasters`, which need no unit that a token
            bypasses, or `end_to_end`, the routers too, by straight-through sigmoid gates (always,
            where they start at random).
        training: `Training`: the options of the distillation.
        lora: `LoraSpec` of a fine-tuning stage at the end; None for none.
        lora_lr: of that stage.
        kv_policy: `keep`, `evict` or `forecast`.
    """

    paper = "extends arXiv 2510.13831"

    def __init__(
        self,
        *,
        sparsity: Sparsity,
        without: Sequence[Part] = (),
        rank: Count = 128,
        neurons: Natural = 256,
        damping: Positive = 1e-3,
        targets: Sequence[Sparsity] = (),
        train: Literal["forecasters", "end_to_end"] = "forecasters",
        training: Training = TRAINING,
        lora: LoraSpec | None = None,
        lora_lr: Positive = 2e-4,
        kv_policy: KVPolicy = "keep",
    ) -> None:
        parts = frozenset(get_args(Part)) - frozenset(without)
        training = grouped(training, TRAINING)
        if "controller" not in parts:
            training = replace(training, hold=0.0)
        forecasters = Forecasters(
            rank=rank,
            options=ForecasterOptions(damping=damping),
            neurons=neurons if "neurons" in parts else 0,
            allocate={"allocation", "closed_form"} <= parts,
        )
        super().__init__(
            sparsity=sparsity,
            routers=Routers(more=int("code_norm" in parts)),
            forecasters=forecasters,
            training=training,
            targets=targets,
            lora=lora,
            lora_lr=lora_lr,
            kv_policy=kv_policy,
        )
        self.parts, self.damping = parts, damping
        self.end_to_end = train == "end_to_end" or "closed_form" not in parts

    def adopt(self, shapes: Mapping[str, Sequence[int]]) -> None:
        assert self.forecasters is not None
        self.forecasters.adopt(shapes, "forecasters.")
        if self.keys is not None:
            self.keys.follow()

    def read(self, site: Site, x: Tensor) -> Tensor:
        """The unit's normalised input, and the log norm of the forecaster's bottleneck."""
        if "code_norm" not in self.parts:
            return x
        assert self.forecasters is not None
        norm = self.forecasters.at(site).code(x).norm(dim=-1, keepdim=True)
        return torch.cat([x.float(), (norm + EPSILON).log()], dim=-1)

    def gate(self, logits_BT: Tensor, ctx: RouteContext) -> Tensor:
        return sigmoid_gate(logits_BT, tau=self.training_options.tau(ctx.anneal))

    def linear(self, site: Site) -> LinearUnit | None:
        return None if "code_norm" in self.parts else self.linear_unit(site)

    def stages(self, budget: Budget) -> Iterable[Stage]:
        assert self.forecasters is not None
        if "closed_form" in self.parts:
            start = RouterOptions(
                sensitivity="sensitivity" in self.parts, kind_shift="kind_shift" in self.parts
            )
            forecasters = self.forecasters
            yield from self.start_stages(start, budget, damping=self.damping, missed_by=forecasters)
        elif self.keys is not None:
            yield self.keys.stage("keys")
        if "distillation" in self.parts:
            yield self.train_stage(
                "distill",
                [self.forecasters, self.routers] if self.end_to_end else [self.forecasters],
                budget.routers,
                hard=not self.end_to_end,
            )
            if self.keys is not None:
                yield self.keys.stage("keys_again", per_target=not self.targets)
        yield from self.lora_stages(budget)

    def cost(self, site: Site) -> SiteCost:
        cost = super().cost(site)
        if "code_norm" not in self.parts:
            return cost
        assert self.forecasters is not None
        code = self.forecasters.at(site).down.weight.numel()
        return replace(cost, route=cost.route + 2.0 * code)
