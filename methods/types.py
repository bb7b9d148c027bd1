"""The words of the contract: where a method routes, what it decides, how it is trained.

Method files import these names from `methods.base`, parts from here.

Shapes: B batch, T tokens, D model width, N valid tokens of a batch (padding removed), r rank,
F neurons of an MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor, nn

from methods.options import LoraSpec

Kind = Literal["attention", "mlp", "block"]


class OutOfReach(ValueError):
    """The routed sites cannot bypass as much as asked."""


class BrokenContract(TypeError):
    """A method returned something else than the contract says; the message is one line."""


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

    def query_flops(self) -> float:
        """Count the FLOPs per token of the query and the output projection of an attention."""
        return 2.0 * 2.0 * self.width * self.heads * self.head_dim

    def key_value_flops(self) -> float:
        """Count those of its key and value projections."""
        return 2.0 * 2.0 * self.width * self.kv_heads * self.head_dim

    def score_flops(self) -> float:
        """Count those of each key that a query attends to."""
        return 4.0 * self.heads * self.head_dim

    def mlp_flops(self) -> float:
        """Count those of an MLP of three matrices."""
        return 3.0 * 2.0 * self.width * self.mlp_width

    def bypass_flops(self, site: Site, keys: float) -> float:
        """Count what a token saves that bypasses a site and keeps its keys and values.

        Args:
            keys: that its query would have attended to.
        """
        own = {"attention": self.query_flops() + keys * self.score_flops(), "mlp": self.mlp_flops()}
        return sum(own[unit.kind] for unit in site.units)


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
    """float: factor of what the token gets, the unit's output or the estimate, or one for each of
    its D numbers, [B, T, D]; None means 1.
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
    """bool: False for padding and for reserved tokens, whose decision counts for nothing."""
    training: bool
    """True in a training stage; only then may a method sample or look along the sequence."""
    anneal: float
    """Progress of the current stage, 0 at its first step and 1 at its last."""
    target: float | None = None
    """Sparsity that this training step aims at; None outside training."""
    output: Callable[[], Tensor] | None = None
    """Computes what the unit would add to every token's residual stream, [B, T, D]. An oracle
    may look; a method that does has not saved anything yet."""
    layer_input_BTD: Tensor | None = None
    """The residual stream that enters the layer: its attention has since added to it at an MLP."""
    swiglu: Callable[[], SwiGLU] | None = None
    """Gives the weights of the layer's MLP; raises ValueError where they are more than matrices."""
    memory: dict[str, Any] = field(default_factory=dict)
    """What the method keeps from site to site of one forward call; every call starts with an
    empty one, a decoded token's too."""


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


class SwiGLU(NamedTuple):
    """Weights of an MLP down(silu(gate(x)) * up(x)) of F neurons, in the model's dtype."""

    gate_FD: Tensor
    up_FD: Tensor
    down_DF: Tensor


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
    layer_input_ND: Tensor | None = None
    """Residual stream that enters the unit's layer, under the dense forward."""
    execute_N: Tensor | None = None
    """bool, under the routed forward: which tokens execute the unit."""
    keys: Callable[[], Tensor] | None = None
    """Computes K and V of these tokens before rotation and key norm, [N, 2 * key-value heads *
    head size], under the dense forward at an attention unit."""
    neurons: Callable[[], Tensor] | None = None
    """Computes what an MLP's down projection reads of these tokens, silu(gate(x)) * up(x), [N, F],
    under the dense forward at an MLP unit."""


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
    fixed_weight: float = 0.0
    """Those of them that every token bypasses without a score."""
    flops_ratio: float = 1.0
    """Executed FLOPs over dense ones, everything counted."""


class Probe(Protocol):
    """A model and its text as a training-free fit may see them."""

    shape: Shape

    @property
    def row(self) -> int:
        """Tokens of a row of its text."""

    def stream(self, visit: Callable[[UnitView], None], split: str = "train") -> None:
        """Call `visit` for every unit and batch under the dense forward, without gradient."""

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

    def routed_loss(self, tokens: int | None = None) -> float:
        """LM loss of the routed model at the method's threshold, nats per token; as `loss`."""


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


@dataclass
class Stage:
    """One step of a recipe: either `fit` (no gradient) or `loss` with `parameters`."""

    name: str
    fit: Callable[[Probe], None] | None = None
    fit_bytes: int = 0
    """What `fit` keeps beside the model while it reads; a plan counts it."""
    loss: Callable[[UnitView], Tensor] | Callable[[RoutedView], Tensor] | None = None
    forward: Literal["dense", "routed"] = "routed"
    """`dense`: `loss` sees a UnitView per unit; `routed`: a RoutedView per batch."""
    parameters: Sequence[nn.Parameter] = field(default_factory=list)
    lora: LoraSpec | None = None
    """Train these adapters of the backbone beside `parameters`. They act in the routed model only:
    from this stage on until the method is dropped, never in the dense model or a teacher."""
    share_text: bool = False
    """Read the same rows for each of `targets` before the next, so that the dense model's states
    are computed once for all of them."""
    positions: float = 1.0
    """Share of the tokens, drawn anew, whose distributions are distilled: every token's states are
    computed, but logits, as wide as the vocabulary, of these alone."""
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
    """True if the product depends on the target sparsity; others are shared by a sweep. A gradient
    stage of the routed model that is per target, or has `targets`, begins at `Method.start`."""
    targets: Sequence[float] = ()
    """Train for several target sparsities in turn; each step runs at the threshold of its own."""
    hold: float = 0.0
    """Above 0, training runs at the target whatever the scores do: the next step's threshold is
    the quantile of this step's scores at a share that moves by `hold` times (target - realised
    sparsity), from what the step realised where decisions are `hard`. 0 leaves the threshold where
    the stage began."""
    report: Callable[[Probe], dict[str, float]] | None = None
    """Figures worth keeping in the result record, measured after the stage."""
