"""What a fit, a loss or a calibration sees of a forward.

Part of the contract; import these names from `methods.base`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from methods.base import Decision, Site


@dataclass
class UnitView:
    """One unit under the dense (or the routed) forward: what a forecaster learns from."""

    site: Site
    x_ND: Tensor
    """Normalised input, padding removed."""
    y_ND: Tensor
    """The unit's output, before the residual addition."""
    residual_ND: Tensor
    """Residual stream that enters the unit."""
    execute_N: Tensor | None = None
    """bool, under the routed forward: which tokens execute the unit."""
    keys: Callable[[], Tensor] | None = None
    """Computes K and V of these tokens before rotation and key norm, [N, 2 * key-value heads *
    head size], under the dense forward at an attention unit."""
    neurons: Callable[[], Tensor] | None = None
    """Computes what an MLP's down projection reads of these tokens, silu(gate(x)) * up(x), [N, F],
    under the dense forward at an MLP unit."""


class SwiGLU(NamedTuple):
    """Weights of an MLP down(silu(gate(x)) * up(x)) of F neurons, in the model's dtype."""

    gate_FD: Tensor
    up_FD: Tensor
    down_DF: Tensor


@dataclass
class RoutedView:
    """One batch under the routed forward: what a router learns from."""

    task_loss: Tensor
    """Mean over predicted tokens: cross-entropy, or KL to the dense model."""
    execute_rate: Tensor
    """Differentiable mean gate over valid tokens and *all* units (never routed ones count 1)."""
    site_rates: dict[Site, Tensor]
    """The same for each routed site."""
    auxiliary: Tensor
    """Mean of the decisions' side losses (zero if there are none)."""
    sparsity: float
    """Target of this step: the point's own, or one of the stage's `targets`."""
    decisions: dict[Site, Decision] = field(default_factory=dict)
    """What each routed site decided, in execution order, with gradient."""
    valid_BT: Tensor | None = None
    """bool: False for padding."""
    anneal: float = 1.0
    """Progress of the stage, 0 at its first step and 1 at its last."""


@dataclass
class RoutedScores:
    """A routed pass over calibration tokens."""

    sparsity: float
    """Realised: bypassed share of (token, unit) pairs over all units."""
    scores: Tensor
    """float32, flat: every score of every routed site."""
    weights: Tensor
    """float32, same length: units that each score decides for (a block's count 2)."""
    total_weight: float
    """Pairs over all units, never routed ones included."""
    is_mlp: Tensor
    """bool, same length: True for the score of an MLP unit."""
