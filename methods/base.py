"""The contract between a routing method and everything else.

A method says *which* computation a token may bypass and *what* it gets instead. It never sees
Hugging Face layers, caches, files or configuration: the engine executes, the runners train.

Shapes: B batch, T tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import ClassVar, get_args

import torch
from torch import Tensor, nn

from methods.options import *  # with the next line, all that a method file needs
from methods.parts.calibration import calibrate_threshold
from methods.types import *


class Method(nn.Module):
    """Base of all methods; a subclass must write `route` and nothing else.

    Sub-modules that a method creates in `setup` are its only trained state; the threshold is a
    buffer, so that saving and loading keeps the decision exactly.
    """

    kv_policy: KVPolicy = "keep"
    paper: ClassVar[str] = ""
    upper_bound: ClassVar[bool] = False
    """True for an oracle: no contender, and marked so in the record, tables and plots."""
    flops_only: ClassVar[bool] = False
    """True where no unit is bypassed whole: a reference that is compared by FLOPs, never by
    sparsity."""
    reserve: int = 1
    """First tokens of every sequence that execute every routed unit, whatever `route` says: the
    engine's work. They carry the attention sink. Not at sites of `fixed`."""
    least_reserve: ClassVar[int] = 0
    """What a paper reserves itself, where the suite's option asks for less."""
    threshold: Tensor

    def __init__(self, *, sparsity: Sparsity) -> None:
        super().__init__()
        if not 0.0 <= sparsity < 1.0:
            raise ValueError(f"sparsity must lie in [0, 1), not {sparsity}")
        self.sparsity = sparsity
        self.shape: Shape | None = None
        self.adapter: nn.Module | None = None
        """LoRA factors of a stage with `lora`; the engine makes and applies them."""
        self.register_buffer("threshold", torch.tensor(float("-inf")))

    @property
    def reserved(self) -> int:
        """How many first tokens of every sequence are executed everywhere."""
        return max(self.reserve, self.least_reserve)

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
        norm nor its keys and values are computed. Its tokens get nothing, unless the site is one
        of `estimated` (static bypass).
        """
        return {}

    def static(self) -> bool:
        """Whether each site treats all tokens alike: a control of token-level routing."""
        sites = self.sites()
        return bool(sites) and set(sites) <= set(self.fixed())

    def estimated(self) -> Collection[Site]:
        """Which of the sites that `fixed` bypasses give every token an estimate; by default none.

        Such a site has no router, gathers nothing, and has no keys and values either.
        """
        return ()

    def estimate(self, site: Site, x_BTD: Tensor, ctx: RouteContext) -> Tensor | None:
        """What every token gets at a site of `estimated`, [B, T, D]; by default `approximate`.

        Args:
            site: where.
            x_BTD: the unit's normalised input, in the model's dtype.
            ctx: with the residual stream, for an estimate that reads it without the norm.
        """
        return self.approximate(site, x_BTD)

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

        Fused execution then calls neither of the two, nor `estimate` at a site of `estimated`,
        where the score is not read; None (the default) keeps to them.
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

    def start(self, probe: Probe, sparsity: float) -> None:
        """Set the threshold at which a gradient stage for this target begins.

        By default where the routed model realises it, so that no step is spent on finding the
        rate and the model is trained at the point at which it will be judged.
        """
        self.calibrate(probe, sparsity)

    def calibrate(self, probe: Probe, sparsity: float) -> float | None:
        """Set the threshold so that the routed model realises `sparsity` on calibration text.

        The search is on the routed model: decisions upstream change hidden states downstream,
        so quantiles of the dense model's scores would be biased.

        Returns:
            What it realised there; None if that was not measured.
        """
        found = calibrate_threshold(probe, sparsity)
        self.threshold.fill_(found.threshold)
        return found.sparsity

    def decide(self, scores_BT: Tensor) -> Decision:
        """The deterministic decision of evaluation: execute where the score is above."""
        execute_BT = scores_BT > self.threshold
        return Decision(execute_BT, execute_BT.to(scores_BT.dtype), scores_BT)
