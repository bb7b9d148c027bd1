"""The LoRA stage of a recipe: fine-tune the backbone under its routing, routers frozen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from methods.types import LoraSpec, RoutedView, Stage, StageBudget


def lora_spec(options: Mapping[str, Any] | None) -> LoraSpec | None:
    """The spec of a method's `lora` option: None for no stage, `{}` for the published defaults.

    Raises:
        TypeError, ValueError: an unknown key or an impossible value.
    """
    return None if options is None else LoraSpec(**options)


def lora_stage(
    spec: LoraSpec,
    budget: StageBudget,
    *,
    loss: Callable[[RoutedView], Tensor] = lambda view: view.task_loss,
    lr: float = 2e-4,
    targets: Sequence[float] = (),
) -> Stage:
    """Adapters alone, on hard decisions at the threshold of each target.

    Published (informed routing and SkipGPT, stage 3): rank 16, alpha 32, dropout 0.1 on q, v and
    gate, learning rate 2e-4, cosine with a tenth of warm-up. There the routers sample Gumbel noise
    meanwhile; here they decide as they will at inference.
    """
    return Stage(
        "lora",
        loss=loss,
        lora=spec,
        hard=True,
        budget=budget,
        lr=lr,
        schedule="cosine",
        warmup=0.1,
        per_target=not targets,
        targets=targets,
        calibrate_first=True,
    )
