"""The Lightweight Feature Forecaster (LFF): a rank-r estimate of a unit's output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from methods.base import Probe, Site, Stage, StageBudget, UnitView
from methods.parts.ridge import Moments

Activation = Literal["silu", "identity"]
Fit = Literal["closed_form", "sgd"]


class Forecaster(nn.Module):
    """Linear(D, r) -> activation -> Linear(r, D) on the unit's normalised input.

    Float32 parameters, initialised N(0, 1e-3) with zero biases as in the published code of
    informed routing (arXiv 2510.13831); with `identity` it is the closed form's linear map.
    """

    def __init__(self, *, width: int, rank: int, activation: Activation = "silu") -> None:
        super().__init__()
        if activation not in ("silu", "identity"):
            raise ValueError(f"activation must be 'silu' or 'identity', not {activation!r}")
        if not 1 <= rank <= width:
            raise ValueError(f"forecaster rank must lie in 1..{width}, not {rank}")
        self.down = nn.Linear(width, rank)
        self.up = nn.Linear(rank, width)
        self.activation = nn.SiLU() if activation == "silu" else nn.Identity()
        for layer in (self.down, self.up):
            nn.init.normal_(layer.weight, std=1e-3)
            nn.init.zeros_(layer.bias)
        self.flops_per_token = 4.0 * width * rank

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D], in the dtype of x."""
        return self.up(self.activation(self.down(x.float()))).to(x.dtype)

    @torch.no_grad()
    def set_linear(self, down_Dr: Tensor, up_rD: Tensor, bias_D: Tensor) -> None:
        """Make the map x @ down @ up + bias; exact only with the identity activation."""
        self.down.weight.copy_(down_Dr.T)
        self.down.bias.zero_()
        self.up.weight.copy_(up_rD.T)
        self.up.bias.copy_(bias_D)


class Forecasters(nn.Module):
    """One forecaster per site, and the two ways to fit them.

    Args:
        rank: r of every forecaster.
        fit: `closed_form` (reduced-rank ridge regression, identity activation) or `sgd`
            (the paper's: SmoothL1 on the unit's output under the dense forward).
        activation: between the two linears; None is `identity` for the closed form, which needs
            it, and the paper's `silu` for `sgd`.
        damping: ridge penalty relative to the mean input variance.
        lr: learning rate of `sgd`, cosine schedule (paper: 1e-3).
    """

    def __init__(
        self,
        *,
        rank: int,
        fit: Fit = "closed_form",
        activation: Activation | None = None,
        damping: float = 1e-3,
        lr: float = 1e-3,
    ) -> None:
        super().__init__()
        if fit not in ("closed_form", "sgd"):
            raise ValueError(f"forecaster fit must be 'closed_form' or 'sgd', not {fit!r}")
        activation = activation or ("identity" if fit == "closed_form" else "silu")
        if fit == "closed_form" and activation != "identity":
            raise ValueError("a closed-form forecaster is linear: activation must be 'identity'")
        self.rank, self.fit, self.activation = rank, fit, activation
        self.damping, self.lr = damping, lr
        self.modules_by_site = nn.ModuleDict()

    def create(self, sites: Sequence[Site], width: int) -> None:
        """One forecaster for each site; [.., width] -> [.., width]."""
        for site in sites:
            self.modules_by_site[site.key] = Forecaster(
                width=width, rank=self.rank, activation=self.activation
            )

    def forward(self, site: Site, x: Tensor) -> Tensor:
        """Estimate of the unit's output at `site`."""
        return self.modules_by_site[site.key](x)

    def flops_per_token(self, site: Site) -> float:
        """Analytic FLOPs of one estimate."""
        return float(cast("Forecaster", self.modules_by_site[site.key]).flops_per_token)

    def stage(self, budget: StageBudget) -> Stage:
        """The stage that fits all forecasters; shared by all targets."""
        report = self.explained_variance
        if self.fit == "closed_form":
            return Stage("forecasters", fit=self.solve, report=report)
        return Stage(
            "forecasters",
            loss=self._regression_loss,
            forward="dense",
            parameters=list(self.parameters()),
            budget=budget,
            lr=self.lr,
            schedule="cosine",
            report=report,
        )

    def solve(self, probe: Probe) -> None:
        """Closed form: one dense pass, then one float64 solve per site.

        Memory during the pass is 2 D^2 doubles a site.
        """
        moments: dict[str, Moments] = {}

        def visit(view: UnitView) -> None:
            key, width = view.site.key, view.x_ND.shape[-1]
            if key not in self.modules_by_site:
                return
            if key not in moments:
                moments[key] = Moments(inputs=width, outputs=width, device=view.x_ND.device)
            moments[key].add(view.x_ND, view.y_ND)

        probe.stream(visit)
        for key, sums in moments.items():
            down, up, bias = sums.reduced_rank(self.rank, self.damping)
            forecaster = self.modules_by_site[key]
            assert isinstance(forecaster, Forecaster)
            forecaster.set_linear(down, up, bias)

    def explained_variance(self, probe: Probe) -> dict[str, float]:
        """1 - residual / total variance on calibration text, mean over the units of a kind."""
        tally = ExplainedVariance(self)
        probe.stream(tally, split="calibration")
        return tally.by_kind()

    def _regression_loss(self, view: UnitView) -> Tensor:
        """SmoothL1 of forecast and output (published code of informed routing, stage 1)."""
        if view.site.key not in self.modules_by_site:
            return view.x_ND.new_zeros((), dtype=torch.float32)
        return functional.smooth_l1_loss(self(view.site, view.x_ND).float(), view.y_ND.float())


class ExplainedVariance:
    """Streaming 1 - (squared error) / (squared deviation from the mean), per site."""

    def __init__(self, forecasters: Forecasters) -> None:
        self.forecasters = forecasters
        self.sums: dict[Site, list[Tensor]] = {}

    def __call__(self, view: UnitView) -> None:
        """Add the tokens of one unit."""
        if view.site.key not in self.forecasters.modules_by_site:
            return
        y = view.y_ND.double()
        error = y - self.forecasters(view.site, view.x_ND).double()
        count = torch.tensor(float(len(y)), device=y.device)
        new = [count, y.sum(0), y.square().sum(), error.square().sum()]
        old = self.sums.get(view.site)
        self.sums[view.site] = (
            new if old is None else [a + b for a, b in zip(old, new, strict=True)]
        )

    def by_kind(self) -> dict[str, float]:
        """Mean over the sites of a kind, as `explained_variance_<kind>`."""
        kinds: dict[str, list[float]] = {}
        for site, (count, total, squares, error) in self.sums.items():
            deviation = squares - total.square().sum() / count
            kinds.setdefault(site.kind, []).append(float(1 - error / deviation))
        return {f"explained_variance_{k}": sum(v) / len(v) for k, v in kinds.items()}
