"""The gradient stages that recipes share, and the options of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from methods.types import (
    OPTIONS,
    Ge,
    LoraSpec,
    Lt,
    NonNegative,
    Positive,
    Share,
    Stage,
    StageBudget,
    grouped,
)

OPTIMIZER = ("lr", "relative_lr", "schedule", "warmup", "weight_decay", "betas", "hold")
Beta = Annotated[float, Ge(0.0), Lt(1.0)]


@dataclass(frozen=True)
class Training:
    """Options of a gradient stage that moves routers or forecasters."""

    __pydantic_config__ = OPTIONS
    lr: Positive = 2e-3
    relative_lr: bool = False
    """True makes `lr` a share of each parameter's root mean square."""
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: Share = 0.0
    """Share of the steps with a linearly rising learning rate."""
    weight_decay: NonNegative = 0.01
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Of AdamW."""
    hold: NonNegative = 0.0
    """Gain of the controller that moves the threshold after each step; 0 leaves it."""
    tau_start: Positive = 5.0
    """Temperature of the gate's gradient at the stage's first step, then linear (paper: 5)."""
    tau_end: Positive = 1.0
    """At its last (paper: 1)."""
    penalty_weight: NonNegative = 8.0
    """Of |(1 - s) - mean execute rate| (paper: 8)."""

    def optimizer(self) -> dict[str, Any]:
        """Give the fields that are a `Stage`'s."""
        return {name: getattr(self, name) for name in OPTIMIZER}


def lora_spec(options: LoraSpec | Mapping[str, Any] | None) -> LoraSpec | None:
    """Read a method's `lora` option: None for no stage, `{}` for the published defaults."""
    return None if options is None else grouped(options, LoraSpec())


def lora_stage(
    spec: LoraSpec, budget: StageBudget, *, lr: float, targets: Sequence[float] = ()
) -> Stage:
    """Adapters of the backbone alone, on hard decisions at the threshold of each target.

    Published (informed routing and SkipGPT, stage 3): rank 16, alpha 32, dropout 0.1 on q, v and
    gate, learning rate 2e-4, cosine with a tenth of warm-up. There the routers sample Gumbel noise
    meanwhile; here they decide as they will at inference.
    """
    return Stage(
        "lora",
        loss=lambda view: view.task_loss,
        lora=spec,
        hard=True,
        budget=budget,
        lr=lr,
        schedule="cosine",
        warmup=0.1,
        per_target=not targets,
        targets=targets,
    )
