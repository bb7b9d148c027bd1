"""Optimise a training stage: AdamW, its learning rate at each step, the check of each step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from methods.base import Stage
from runners.errors import UserError

LEAST_SIZE = 1e-3
"""Root mean square below which a parameter counts as this large: what starts at zero can move."""


class TrainingDiverged(UserError):
    """A loss became NaN or infinite."""


def optimizer(stage: Stage, parameters: Sequence[nn.Parameter]) -> torch.optim.AdamW:
    """AdamW on the stage's parameters; each group keeps its full rate as `initial_lr`."""
    groups: list[dict[str, Any]] = [{"params": list(parameters), "lr": stage.lr}]
    if stage.relative_lr:
        sizes = [p.detach().float().square().mean().sqrt() for p in parameters]
        rates = (stage.lr * torch.stack(sizes).clamp_min(LEAST_SIZE)).tolist()
        groups = [{"params": [p], "lr": lr} for p, lr in zip(parameters, rates, strict=True)]
    for group in groups:
        group["initial_lr"] = group["lr"]
    return torch.optim.AdamW(groups, betas=stage.betas, weight_decay=stage.weight_decay)


def set_rate(adamw: torch.optim.AdamW, stage: Stage, step: int, steps: int) -> None:
    """Linear warm-up, then the stage's schedule.

    Args:
        step: from 0.
    """
    warmup = round(stage.warmup * steps)
    factor = 1.0
    if step < warmup:
        factor = (step + 1) / warmup
    elif stage.schedule == "cosine":
        factor = 0.5 * (1.0 + math.cos(math.pi * ((step - warmup) / max(1, steps - warmup))))
    for group in adamw.param_groups:
        group["lr"] = group["initial_lr"] * factor


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
