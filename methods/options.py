"""Options of methods: their types and ranges, and the groups that several methods share.

Where a config is read, each option is compared with the type hint of its constructor argument or
field; a class's own checks are of options that do not go together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, TypeVar, get_args

KVPolicy = Literal["keep", "evict", "forecast"]
RouterKind = Literal["linear", "mlp"]
Start = Literal["published", "closed_form"]
"""Where a baseline's training begins: as its paper has it, or as informed routing's does."""
Activation = Literal["silu", "identity"]
Projection = Literal["q", "k", "v", "o", "gate", "up", "down"]
"""Linear maps of a decoder layer that adapters may change."""
T = TypeVar("T")


@dataclass(frozen=True)
class Ge:
    """Marks an option that is at least this, as `Annotated[int, Ge(1)]`."""

    ge: float


@dataclass(frozen=True)
class Gt:
    """Marks an option that is greater than this."""

    gt: float


@dataclass(frozen=True)
class Le:
    """Marks an option that is at most this."""

    le: float


@dataclass(frozen=True)
class Lt:
    """Marks an option that is less than this."""

    lt: float


Count = Annotated[int, Ge(1)]
Natural = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0.0)]
NonNegative = Annotated[float, Ge(0.0)]
Share = Annotated[float, Ge(0.0), Le(1.0)]
BelowOne = Annotated[float, Ge(0.0), Lt(1.0)]
Sparsity = BelowOne


@dataclass(frozen=True)
class LoraSpec:
    """Low-rank adapters on the backbone's projections (Hu et al., arXiv 2106.09685).

    The defaults are those of informed routing's and SkipGPT's published fine-tuning.
    """

    rank: Count = 16
    alpha: Count = 32
    """The update is alpha / rank * B A x."""
    dropout: BelowOne = 0.1
    """On the adapters' input, in training only."""
    targets: Sequence[Projection] = ("q", "v", "gate")

    def __post_init__(self) -> None:
        unknown = sorted(set(self.targets) - set(get_args(Projection)))
        if unknown or not self.targets:
            known = " ".join(get_args(Projection))
            raise ValueError(f"lora targets must be among {known}, not {unknown}")
        object.__setattr__(self, "targets", tuple(self.targets))


@dataclass(frozen=True)
class ForecasterOptions:
    """How forecasters are fitted.

    Raises:
        ValueError: a closed form with another activation than `identity`.
    """

    fit: Literal["closed_form", "sgd"] = "closed_form"
    """`closed_form`: reduced-rank ridge regression, one dense pass; `sgd`: the paper's stage 1,
    SmoothL1 regression on every unit's output by gradient."""
    activation: Activation | None = None
    """Between the two linears; None is `identity` for the closed form, which needs it, and the
    paper's `silu` for `sgd`."""
    lr: Positive = 1e-3
    """Of `sgd`, cosine (paper: 1e-3)."""
    damping: Positive = 1e-3
    """Ridge penalty of the closed forms, relative to the mean variance of what they read."""

    def __post_init__(self) -> None:
        if self.fit == "closed_form" and self.activation not in (None, "identity"):
            raise ValueError("a closed-form forecaster is linear: activation must be 'identity'")


CLOSED_FORM = ForecasterOptions()


@dataclass(frozen=True)
class RouterOptions:
    """Which router scores a token, and where it starts."""

    kind: RouterKind = "linear"
    """`linear`, or the published `mlp` (D -> width -> ReLU -> outputs)."""
    width: Natural = 0
    """Hidden width of `mlp`; 0 means D // 4."""
    start: Literal["recoverability", "none"] = "recoverability"
    """`recoverability`: regression of what a bypass would miss, no gradient; `none`: at random."""
    sensitivity: bool = True
    """Weight the regression by each unit's loss sensitivity."""
    kind_shift: bool = False
    """After that start, move the MLP scores to where the routed model loses least."""


OPTIMIZER = ("lr", "relative_lr", "schedule", "warmup", "weight_decay", "betas", "hold")


@dataclass(frozen=True)
class Training:
    """Options of a gradient stage that moves routers or forecasters."""

    lr: Positive = 2e-3
    relative_lr: bool = False
    """True makes `lr` a share of each parameter's root mean square."""
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: Share = 0.0
    """Share of the steps with a linearly rising learning rate."""
    weight_decay: NonNegative = 0.01
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    """Of AdamW."""
    hold: Share = 0.0
    """Above 0 keeps training at the target: after each step the threshold is set to the quantile
    of its scores, at a share that moves by so much of what the step missed the target by. 0 leaves
    the threshold where the stage began."""
    tau_start: Positive = 5.0
    """Temperature of the gate's gradient at the stage's first step, then linear (paper: 5)."""
    tau_end: Positive = 1.0
    """At its last (paper: 1)."""
    penalty_weight: NonNegative = 8.0
    """Of |(1 - s) - mean execute rate| (paper: 8)."""

    def optimizer(self) -> dict[str, Any]:
        """Give the fields that are a `Stage`'s."""
        return {name: getattr(self, name) for name in OPTIMIZER}

    def tau(self, progress: float) -> float:
        """Temperature at this progress, 0 to 1, of the stage."""
        return self.tau_start + (self.tau_end - self.tau_start) * min(max(progress, 0.0), 1.0)


def grouped(options: T | Mapping[str, Any], default: T) -> T:
    """Read the options of a group: `default` with what a mapping says in place of its own.

    Raises:
        TypeError: neither a mapping nor of the group's class, or an unknown option.
    """
    if isinstance(options, Mapping):
        return replace(default, **options)  # type: ignore[type-var]
    if not isinstance(options, type(default)):
        raise TypeError(f"{type(default).__name__} has options by name; {options!r} is none")
    return options
