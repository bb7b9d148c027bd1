"""Optimiser, learning-rate schedule and the check of each step of a training stage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from methods.base import Stage, StageBudget
from runners.errors import UserError

LEAST_SIZE = 1e-3
"""Root mean square below which a parameter counts as this large: what starts at zero can move."""


class TrainingDiverged(UserError):
    """A loss became NaN or infinite."""


def optimiser(
    stage: Stage, parameters: Sequence[nn.Parameter], budget: StageBudget
) -> tuple[torch.optim.AdamW, Any]:
    """AdamW on the stage's parameters, and its schedule (linear warm-up, then the stage's)."""
    groups: list[dict[str, Any]] = [{"params": list(parameters)}]
    if stage.relative_lr:
        sizes = torch.stack([_root_mean_square(p) for p in parameters]).clamp_min(LEAST_SIZE)
        rates = (stage.lr * sizes).tolist()
        groups = [{"params": [p], "lr": lr} for p, lr in zip(parameters, rates, strict=True)]
    adamw = torch.optim.AdamW(
        groups, lr=stage.lr, betas=stage.betas, weight_decay=stage.weight_decay
    )
    warmup_steps = round(stage.warmup * budget.steps)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        if stage.schedule == "constant":
            return 1.0
        share = (step - warmup_steps) / max(1, budget.steps - warmup_steps)
        return 0.5 * (1.0 + math.cos(math.pi * share))

    return adamw, torch.optim.lr_scheduler.LambdaLR(adamw, factor)


def _root_mean_square(parameter: Tensor) -> Tensor:
    return parameter.detach().float().square().mean().sqrt()


def finite(stage: Stage, step: int, steps: int, loss: Tensor, gradient_norm: Tensor) -> float:
    """The loss as a number; one transfer for both checks.

    Raises:
        TrainingDiverged: the loss or the gradient norm is not finite.
    """
    value, norm = torch.stack([loss.float(), gradient_norm.float()]).tolist()
    for name, figure in (("loss", value), ("gradient norm", norm)):
        if not math.isfinite(figure):
            raise TrainingDiverged(
                f"stage {stage.name}: {name} is {figure} at step {step + 1} of {steps}; "
                f"lower its learning rate (now {stage.lr:g})"
            )
    return float(value)
