"""The Lightweight Feature Forecaster (LFF): a rank-r estimate of a unit's output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from methods.parts.closed_form import fit_closed_form
from methods.parts.neurons import keep_neurons, no_neurons
from methods.types import Probe, Site, Stage, StageBudget, UnitView

Activation = Literal["silu", "identity"]
Fit = Literal["closed_form", "sgd"]
Loss = Literal["smooth_l1", "mse", "cosine"]


class Forecaster(nn.Module):
    """Linear(D, r) -> activation -> Linear(r, D) on the unit's normalised input.

    Float32 parameters, initialised N(0, 1e-3) with zero biases as in the published code of
    informed routing (arXiv 2510.13831); with `identity` it is the closed form's linear map.

    Args:
        neurons: so many of an MLP's own run beside the two maps.
    """

    def __init__(
        self, *, width: int, rank: int, activation: Activation = "silu", neurons: int = 0
    ) -> None:
        super().__init__()
        if activation not in ("silu", "identity"):
            raise ValueError(f"activation must be 'silu' or 'identity', not {activation!r}")
        if not 1 <= rank <= width:
            raise ValueError(f"forecaster rank must lie in 1..{width}, not {rank}")
        self.rank = rank
        self.down = nn.Linear(width, rank)
        self.up = nn.Linear(rank, width)
        self.activation = nn.SiLU() if activation == "silu" else nn.Identity()
        for layer in (self.down, self.up):
            nn.init.normal_(layer.weight, std=1e-3)
            nn.init.zeros_(layer.bias)
        self.neurons = no_neurons(width, neurons) if neurons else None
        self.code_flops_per_token = 2.0 * width * rank
        self.flops_per_token = 2.0 * self.code_flops_per_token + 6.0 * width * neurons

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D], in the dtype of x."""
        inputs = x.float()
        estimate: Tensor = self.up(self.code(inputs))
        if self.neurons is not None:
            estimate = estimate + self.neurons(inputs)
        return estimate.to(x.dtype)

    def remainder(self, x_ND: Tensor, y_ND: Tensor) -> Tensor:
        """What the neurons leave of the unit's output to the two maps, float32 [N, D]."""
        return y_ND.float() if self.neurons is None else y_ND.float() - self.neurons(x_ND.float())

    def code(self, x: Tensor) -> Tensor:
        """The bottleneck, float32 [..., r]."""
        code: Tensor = self.activation(self.down(x.float()))
        return code

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
        rank: r of every forecaster; their mean with `allocate`.
        fit: `closed_form` (reduced-rank ridge regression, identity activation) or `sgd`
            (the paper's: regression by gradient on the unit's output under the dense forward).
        activation: between the two linears; None is `identity` for the closed form, which needs
            it, and the paper's `silu` for `sgd`.
        loss: of `sgd`; `smooth_l1` is the published one, `mse` and `cosine` its alternatives.
        damping: ridge penalty relative to the mean input variance.
        lr: learning rate of `sgd`, cosine schedule (paper: 1e-3).
        allocate: closed form with the total rank spent where it avoids the most error.
    """

    def __init__(
        self,
        *,
        rank: int,
        fit: Fit = "closed_form",
        activation: Activation | None = None,
        loss: Loss = "smooth_l1",
        damping: float = 1e-3,
        lr: float = 1e-3,
        allocate: bool = False,
    ) -> None:
        super().__init__()
        if fit not in ("closed_form", "sgd"):
            raise ValueError(f"forecaster fit must be 'closed_form' or 'sgd', not {fit!r}")
        if loss not in ("smooth_l1", "mse", "cosine"):
            raise ValueError(
                f"forecaster loss must be 'smooth_l1', 'mse' or 'cosine', not {loss!r}"
            )
        activation = activation or ("identity" if fit == "closed_form" else "silu")
        if fit == "closed_form" and activation != "identity":
            raise ValueError("a closed-form forecaster is linear: activation must be 'identity'")
        if fit != "closed_form" and allocate:
            raise ValueError("ranks are allocated by the closed form")
        self.rank, self.fit, self.activation = rank, fit, activation
        self.damping, self.lr, self.loss = damping, lr, loss
        self.allocate = allocate
        self.modules_by_site = nn.ModuleDict()

    def create(self, sites: Sequence[Site], width: int, neurons: int = 0) -> None:
        """One forecaster for each site; [.., width] -> [.., width].

        Args:
            neurons: that the forecaster of an MLP keeps of its own.
        """
        self.width, self.neurons = width, neurons
        for site in sites:
            self._put(site.key, self.rank)

    def resize(self, site: Site, rank: int) -> None:
        """Give a site's forecaster another rank; it starts anew if that differs from its own."""
        if self.at(site).rank != rank:
            self._put(site.key, rank)

    def adopt(self, shapes: Mapping[str, Sequence[int]], prefix: str) -> None:
        """Ranks of saved tensors: `<prefix>modules_by_site.<key>.down.weight` is [r, D]."""
        for key, forecaster in self.modules_by_site.items():
            shape = shapes.get(f"{prefix}modules_by_site.{key}.down.weight")
            if shape is not None and 1 <= shape[0] <= self.width and shape[0] != forecaster.rank:
                self._put(key, int(shape[0]))

    def __contains__(self, site: Site) -> bool:
        return site.key in self.modules_by_site

    def at(self, site: Site) -> Forecaster:
        """The forecaster of one site."""
        return cast(Forecaster, self.modules_by_site[site.key])

    def forward(self, site: Site, x: Tensor) -> Tensor:
        """Estimate of the unit's output at `site`."""
        return self.modules_by_site[site.key](x)

    def flops_per_token(self, site: Site) -> float:
        """Analytic FLOPs of one estimate."""
        return self.at(site).flops_per_token

    def stage(self, budget: StageBudget) -> Stage:
        """The stage that fits all forecasters; shared by all targets."""
        report = self.explained_variance
        if self.fit == "closed_form":
            held = 2 * 8 * self.width**2 * len(self.modules_by_site)  # two D x D doubles a site
            return Stage("forecasters", fit=self.solve, fit_bytes=held, report=report)
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
        """Closed form from a dense pass over the fit text, after the choice of neurons."""
        kept = {site: self.at(site).neurons for site in probe.shape.units() if site in self}
        keep_neurons(probe, {site: own for site, own in kept.items() if own is not None})
        fit_closed_form(probe, self, damping=self.damping, allocate=self.allocate)

    def explained_variance(self, probe: Probe) -> dict[str, float]:
        """1 - residual / total variance on a share of the calibration text, mean of each kind."""
        tally = ExplainedVariance(self)
        probe.sample().stream(tally, split="calibration")
        return tally.by_kind()

    def _put(self, key: str, rank: int) -> None:
        made = Forecaster(
            width=self.width,
            rank=rank,
            activation=self.activation,
            neurons=self.neurons if key.endswith("mlp") else 0,
        )
        if key in self.modules_by_site:
            old = cast(Forecaster, self.modules_by_site[key])
            made = made.to(old.up.weight.device)
            made.neurons = old.neurons
        self.modules_by_site[key] = made

    def _regression_loss(self, view: UnitView) -> Tensor:
        """Distance of forecast and output (published code of informed routing, stage 1)."""
        if view.site not in self:
            return view.x_ND.new_zeros((), dtype=torch.float32)
        estimate, output = self(view.site, view.x_ND).float(), view.y_ND.float()
        if self.loss == "smooth_l1":
            return functional.smooth_l1_loss(estimate, output)
        if self.loss == "mse":
            return functional.mse_loss(estimate, output)
        return (1.0 - functional.cosine_similarity(estimate, output, dim=-1)).mean()


class ExplainedVariance:
    """Streaming 1 - (squared error) / (squared deviation from the mean), per site."""

    def __init__(self, forecasters: Forecasters) -> None:
        self.forecasters = forecasters
        self.sums: dict[Site, list[Tensor]] = {}

    def __call__(self, view: UnitView) -> None:
        """Add the tokens of one unit."""
        if view.site not in self.forecasters:
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
