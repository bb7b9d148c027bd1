"""Informed routing, extended: a closed-form start, then distillation of the whole routed model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Literal, get_args

from torch import Tensor

from methods.base import Budget, LinearUnit, RouteContext, Site, Stage
from methods.options import (
    Count,
    ForecasterOptions,
    Gt,
    KVPolicy,
    Le,
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
from methods.parts.routers import Routers

Part = Literal[
    "closed_form",
    "neurons",
    "sensitivity",
    "per_flop",
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
    hold=0.2,
    tau_start=1.0,
    tau_end=1.0,
    penalty_weight=0.0,
)


class InformedPlus(RoutedMethod):
    """Informed routing (arXiv 2510.13831) with what survived ablation; ours, not the paper's.

    1. Forecasters in closed form: a few of an MLP's own neurons, and the reduced-rank ridge
       regression of what they leave of the unit's output.
    2. Recoverability routers: ridge regression of the log of the forecast's error, weighted by the
       unit's loss sensitivity and by the root of the FLOPs that its bypass saves, so that one
       global threshold spends FLOPs where they matter. MLP scores are then shifted against
       attention's to where the routed model loses least at equal FLOPs.
    3. Distillation of the forecasters in the routed model: KL to the dense model's distributions, a
       controller that holds the realised sparsity at the target. The routers stay as they are:
       trained along (`train=end_to_end`), they undo more than they bring.

    `experiment=ablation` leaves out one part at a time, at one budget.

    Args:
        without: parts to leave out. `closed_form`: random forecasters and routers (published
            initialisation); `neurons`: all forecasts are linear; `sensitivity`: of the
            routers' regression; `per_flop`: units are compared by harm, not by harm per FLOP;
            `kind_shift`: the MLP scores' shift; `allocation`: every unit gets the same rank;
            `distillation`, the gradient stage; `controller`: the threshold stays where calibration
            put it.
        rank: of the forecasters, their mean over the units.
        neurons: of each MLP's own, those that its forecaster keeps.
        damping: of the ridge regressions.
        targets: one budget-conditional training for these sparsities in turn; empty trains for the
            point's own.
        train: what the distillation moves: `forecasters`, which need no unit that a token
            bypasses, or `end_to_end`, the routers too, by straight-through sigmoid gates (always,
            where they start at random).
        positions: share of each row's tokens whose distributions are distilled.
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
        rank: Count = 64,
        neurons: Natural = 192,
        damping: Positive = 1e-3,
        targets: Sequence[Sparsity] = (),
        train: Literal["forecasters", "end_to_end"] = "forecasters",
        positions: Annotated[float, Gt(0.0), Le(1.0)] = 0.25,
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
            routers=Routers(),
            forecasters=forecasters,
            training=training,
            targets=targets,
            lora=lora,
            lora_lr=lora_lr,
            kv_policy=kv_policy,
        )
        self.parts, self.damping = parts, damping
        self.positions = positions
        self.end_to_end = train == "end_to_end" or "closed_form" not in parts

    def adopt(self, shapes: Mapping[str, Sequence[int]]) -> None:
        assert self.forecasters is not None
        self.forecasters.adopt(shapes, "forecasters.")
        if self.keys is not None:
            self.keys.follow()

    def gate(self, logits_BT: Tensor, ctx: RouteContext) -> Tensor:
        return sigmoid_gate(logits_BT, tau=self.training_options.tau(ctx.anneal))

    def linear(self, site: Site) -> LinearUnit | None:
        return self.linear_unit(site)

    def stages(self, budget: Budget) -> Iterable[Stage]:
        assert self.forecasters is not None
        if "closed_form" in self.parts:
            start = RouterOptions(
                sensitivity="sensitivity" in self.parts, kind_shift="kind_shift" in self.parts
            )
            yield from self.start_stages(
                start,
                budget,
                damping=self.damping,
                missed_by=self.forecasters,
                per_flop="per_flop" in self.parts,
            )
        elif self.keys is not None:
            yield self.keys.stage("keys")
        if "distillation" in self.parts:
            yield self.train_stage(
                "distill",
                [self.forecasters, self.routers] if self.end_to_end else [self.forecasters],
                budget.routers,
                hard=not self.end_to_end,
                share_text=True,
                positions=self.positions,
            )
            if self.keys is not None:
                yield self.keys.stage("keys_again", per_target=not self.targets)
        yield from self.lora_stages(budget)
