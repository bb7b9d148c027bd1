"""How a method is trained: budgets and the stages of its recipe.

Part of the contract; import these names from `methods.base`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

if TYPE_CHECKING:
    from methods.base import Probe, RoutedView, UnitView

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
"""Linear maps of a decoder layer that adapters may change."""


@dataclass(frozen=True)
class StageBudget:
    """How much one stage may spend."""

    steps: int
    batch_size: int
    seq_len: int
    accumulate: int = 1

    @property
    def tokens(self) -> int:
        """Tokens that the stage reads in all."""
        return self.steps * self.accumulate * self.batch_size * self.seq_len


@dataclass(frozen=True)
class Budget:
    """Equal for all methods that are compared."""

    name: str
    fit_tokens: int
    """Tokens of training text that a training-free fit reads."""
    calibration_tokens: int
    sensitivity_tokens: int
    forecasters: StageBudget
    """Unit-wise regression by gradient."""
    routers: StageBudget
    """Gradient training of routers (and of what is trained with them)."""
    lora: StageBudget
    """Fine-tuning of the backbone's low-rank adapters."""


@dataclass(frozen=True)
class LoraSpec:
    """Low-rank adapters on the backbone's projections (Hu et al., arXiv 2106.09685).

    The defaults are those of informed routing's and SkipGPT's published fine-tuning.
    """

    rank: int = 16
    alpha: int = 32
    """The update is alpha / rank * B A x."""
    dropout: float = 0.1
    """On the adapters' input, in training only."""
    targets: Sequence[str] = ("q", "v", "gate")
    """Projections, of `q k v o gate up down`."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.targets) - set(PROJECTIONS))
        if unknown or not self.targets:
            raise ValueError(f"lora targets must be among {' '.join(PROJECTIONS)}, not {unknown}")
        if self.rank < 1 or not 0.0 <= self.dropout < 1.0:
            raise ValueError("lora needs rank >= 1 and dropout in [0, 1)")
        object.__setattr__(self, "targets", tuple(self.targets))


@dataclass
class Stage:
    """One step of a recipe: either `fit` (no gradient) or `loss` with `parameters`."""

    name: str
    fit: Callable[[Probe], None] | None = None
    loss: Callable[[UnitView], Tensor] | Callable[[RoutedView], Tensor] | None = None
    forward: Literal["dense", "routed"] = "routed"
    """`dense`: `loss` sees a UnitView per unit; `routed`: a RoutedView per batch."""
    parameters: Sequence[nn.Parameter] = field(default_factory=list)
    lora: LoraSpec | None = None
    """Train these adapters of the backbone beside `parameters`. They act in the routed model only:
    from this stage on until the method is dropped, never in the dense model or a teacher."""
    hard: bool = False
    """Decide as at evaluation (`ctx.training` is False): no sampling, no gradient through the
    gates, so units need not run for the tokens that bypass them. For stages that train no
    router."""
    budget: StageBudget | None = None
    lr: float = 1e-3
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: float = 0.0
    """Share of the steps with a linearly rising learning rate."""
    relative_lr: bool = False
    """True makes `lr` a share of each parameter's root mean square at the start (as Adafactor's
    relative step, Shazeer and Stern, arXiv 1804.04235), so that units of any scale move alike."""
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    """Of AdamW."""
    clip_norm: float = 1.0
    per_target: bool = False
    """True if the product depends on the target sparsity; others are shared by a sweep."""
    calibrate_first: bool = False
    """Set the threshold for the target (or for each of `targets`) before the first step."""
    targets: Sequence[float] = ()
    """Train for several target sparsities in turn; each step runs at the threshold that was
    calibrated for its target before the stage (0 without `calibrate_first`)."""
    hold: float = 0.0
    """Gain of a controller: after each step the threshold of its target moves by `hold` times
    (target - realised sparsity), so that training runs at the target whatever the scores do."""
    report: Callable[[Probe], dict[str, float]] | None = None
    """Figures worth keeping in the result record, measured after the stage."""


def middle(targets: Sequence[float], sparsity: float) -> float:
    """The target that a fit reads which all points share: the middle one, or the only one."""
    return sorted(targets)[len(targets) // 2] if targets else sparsity
