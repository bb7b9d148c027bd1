"""The contract between a routing method and everything else.

A method says *which* computation a token may bypass and *what* it gets instead. It never sees
Hugging Face layers, caches, files or configuration: the engine executes, the runners train.

Shapes: B batch, T tokens, D model width, N valid tokens of a batch (padding removed).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor, nn

from methods.recipe import Budget as Budget
from methods.recipe import LoraSpec as LoraSpec
from methods.recipe import Stage as Stage
from methods.recipe import StageBudget as StageBudget
from methods.recipe import middle as middle
from methods.views import RoutedScores as RoutedScores
from methods.views import RoutedView as RoutedView
from methods.views import SwiGLU as SwiGLU
from methods.views import UnitView as UnitView

Kind = Literal["attention", "mlp", "block"]
KVPolicy = Literal["keep", "evict", "forecast"]


class OutOfReach(ValueError):
    """The routed sites cannot bypass as much as asked."""


class Site(NamedTuple):
    """One place where computation may be bypassed: a sublayer, or a whole block."""

    layer: int
    kind: Kind

    @property
    def units(self) -> tuple[Site, ...]:
        """The attention and MLP units that one decision here covers (a block covers two)."""
        if self.kind == "block":
            return (Site(self.layer, "attention"), Site(self.layer, "mlp"))
        return (self,)

    @property
    def key(self) -> str:
        """Name usable inside an `nn.ModuleDict`."""
        return f"{self.layer}_{self.kind}"


@dataclass(frozen=True)
class Shape:
    """Sizes of the model that a method routes."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    vocab: int

    def units(self) -> list[Site]:
        """Every attention and MLP unit in execution order; sparsity is a mean over these."""
        kinds: tuple[Kind, Kind] = ("attention", "mlp")
        return [Site(layer, kind) for layer in range(self.layers) for kind in kinds]


@dataclass
class Decision:
    """What a method decided for each token at one site."""

    execute_BT: Tensor
    """bool: True runs the unit, False bypasses it. Drives the engine."""
    gate_BT: Tensor
    """float: equal to the mask in value outside training; carries the gradient in training."""
    scores_BT: Tensor
    """float32: execute where above the threshold; read by calibration and analysis."""
    auxiliary: Tensor | None = None
    """Scalar side loss of the router, training only (for example BCE to a top-k membership)."""
    scale_BT: Tensor | None = None
    """float: factor of what the token gets, the unit's output or the estimate; None means 1.
    It carries the gradient of a gate that scales instead of sampling, and the blend itself then
    follows the hard mask."""


@dataclass
class RouteContext:
    """What a decision may use besides the unit's normalised input."""

    residual_BTD: Tensor
    """The residual stream before the unit's norm."""
    positions_BT: Tensor
    """int64: index of each token among the valid tokens of its sequence."""
    valid_BT: Tensor
    """bool: False for padding."""
    training: bool
    """True in a training stage; only then may a method sample or look along the sequence."""
    anneal: float
    """Progress of the current stage, 0 at its first step and 1 at its last."""
    target: float | None = None
    """Sparsity that this training step aims at; None outside training."""
    output: Callable[[], Tensor] | None = None
    """Computes what the unit would add to every token's residual stream, [B, T, D]. An oracle
    may look; a method that does has not saved anything yet."""


class Probe(Protocol):
    """A model and its text as a training-free fit may see them."""

    shape: Shape

    def stream(self, visit: Callable[[UnitView], None], split: str = "train") -> None:
        """Call `visit` for every unit and batch under the dense forward, without gradient."""

    def stream_routed(self, visit: Callable[[UnitView], None]) -> None:
        """The same for every routed site under the routed forward, on train text.

        Every unit runs for every token; those that bypass it go on with their estimate.
        """

    def loss(self, bypassed: Collection[Site], tokens: int | None = None) -> float:
        """LM loss in nats per token with these sites bypassed by all.

        On the calibration text, or with `tokens` on about so many tokens of the training text.
        """

    def sensitivity(self) -> dict[Site, float]:
        """Root mean square, over tokens and dimensions, of d(LM loss)/d(unit output)."""

    def swiglu(self, site: Site) -> SwiGLU:
        """The weights of an MLP unit.

        Raises:
            ValueError: it is something else, or its projections are more than matrices.
        """

    def sample(self, share: float = 0.25) -> Probe:
        """A probe of the same model on a share of its train and calibration text."""

    def routed_scores(self, threshold: float) -> RoutedScores:
        """Route calibration text with this threshold and report what it realised."""

    def routed_loss(self) -> float:
        """LM loss of the routed model at the method's threshold, nats per calibration token."""


@dataclass(frozen=True)
class SiteCost:
    """Analytic FLOPs that a method adds per token at one site (multiply and add count two)."""

    route: float = 0.0
    approximate: float = 0.0
    stored: float = 0.0
    """Numbers, not FLOPs: what a bypassed token keeps instead of K and V (policy `forecast`)."""


@dataclass(frozen=True)
class LinearUnit:
    """A site whose decision and estimate are plain maps of the unit's normalised input x.

    It executes where x @ score_D + offset is above the threshold; a bypassed token gets
    up @ act(down @ x + down_bias) + bias, or nothing without `down_rD`. All float32.
    """

    score_D: Tensor
    offset: Tensor
    """0-dim."""
    down_rD: Tensor | None = None
    down_bias_r: Tensor | None = None
    up_Dr: Tensor | None = None
    bias_D: Tensor | None = None
    silu: bool = False
    """SiLU between the two maps; else none."""


class Method(nn.Module):
    """Base of all methods; a subclass must write `route` and nothing else.

    Sub-modules that a method creates in `setup` are its only trained state; the threshold is a
    buffer, so that saving and loading keeps the decision exactly.
    """

    kv_policy: KVPolicy = "keep"
    paper: ClassVar[str] = ""
    upper_bound: ClassVar[bool] = False
    """True for an oracle: no contender, and marked so in the record, tables and plots."""
    threshold: Tensor

    def __init__(self, *, sparsity: float) -> None:
        super().__init__()
        if not 0.0 <= sparsity < 1.0:
            raise ValueError(f"sparsity must lie in [0, 1), not {sparsity}")
        self.sparsity = sparsity
        self.shape: Shape | None = None
        self.adapter: nn.Module | None = None
        """LoRA factors of a stage with `lora`; the engine makes and applies them."""
        self.register_buffer("threshold", torch.tensor(float("-inf")))

    def setup(self, shape: Shape) -> None:
        """Create routers and forecasters for a model of this shape.

        Raises:
            ValueError: an unknown KV policy.
        """
        if self.kv_policy not in get_args(KVPolicy):
            known = ", ".join(get_args(KVPolicy))
            raise ValueError(f"kv_policy must be one of {known}, not {self.kv_policy!r}")
        self.shape = shape

    def sites(self) -> Sequence[Site]:
        """Where this method routes; by default every attention and every MLP unit."""
        assert self.shape is not None, "setup() comes first"
        return self.shape.units()

    def reach(self) -> float:
        """Largest sparsity that the sites allow: their share of the model's units."""
        assert self.shape is not None, "setup() comes first"
        return sum(len(site.units) for site in self.sites()) / len(self.shape.units())

    def achievable(self, sparsity: float) -> float:
        """What the method can realise of a target; the nearest step where it is discrete."""
        return sparsity

    def fixed(self) -> Mapping[Site, bool]:
        """Sites whose decision is the same for every token: True executes, False bypasses.

        The engine asks no router there, and a unit that all bypass costs nothing: neither its
        norm nor its keys and values are computed.
        """
        return {}

    def route(self, site: Site, x_BTD: Tensor, ctx: RouteContext) -> Decision:
        """Decide for each token whether to execute the unit.

        Args:
            site: where.
            x_BTD: the unit's normalised input, in the model's dtype.
            ctx: residual stream, positions, validity, training state.
        """
        raise NotImplementedError(f"{type(self).__name__} must define route()")

    def approximate(self, site: Site, x_BTD: Tensor) -> Tensor | None:
        """What a bypassed token gets instead of the unit's output; None means skip (zero)."""
        return None

    def forecast_keys(self, site: Site, x_BTD: Tensor) -> Tensor | None:
        """K and V of a bypassed token under KV policy `forecast`, before rotation and key norm.

        Returns:
            [..., 2 * key-value heads * head size], K first; None under the other policies.
        """
        return None

    def linear(self, site: Site) -> LinearUnit | None:
        """What `route` and `approximate` do at evaluation, if it is this simple.

        Fused execution then calls neither of the two; None (the default) keeps to them.
        """
        return None

    def cost(self, site: Site) -> SiteCost:
        """Analytic FLOPs per token that routing and approximating add at this site."""
        return SiteCost()

    def adopt(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Take the shapes of saved tensors, by state name, that a fit may have chosen."""

    def fit(self, probe: Probe) -> None:
        """Training-free fitting, before `stages`; must not depend on the target sparsity."""

    def stages(self, budget: Budget) -> Iterable[Stage]:
        """Recipe after `fit`; by default nothing to train."""
        return []

    def calibrate(self, probe: Probe, sparsity: float) -> float | None:
        """Set the threshold so that the routed model realises `sparsity` on calibration text.

        The search is on the routed model: decisions upstream change hidden states downstream,
        so quantiles of the dense model's scores would be biased.

        Returns:
            What it realised there; None if that was not measured.
        """
        from methods.parts.calibration import calibrate_threshold

        found = calibrate_threshold(probe, sparsity)
        self.threshold.fill_(found.threshold)
        return found.sparsity

    def decide(self, scores_BT: Tensor) -> Decision:
        """The deterministic decision of evaluation: execute where the score is above."""
        execute_BT = scores_BT > self.threshold
        return Decision(execute_BT, execute_BT.to(scores_BT.dtype), scores_BT)
