"""The Lightweight Feature Forecaster (LFF): a rank-r estimate of a unit's output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from methods.options import CLOSED_FORM, Activation, ForecasterOptions
from methods.parts.narrow_ffn import keep_neurons, no_neurons
from methods.parts.ridge import Components, allocated, site_moments
from methods.parts.routers import PerSite
from methods.types import Probe, Shape, Site, Stage, StageBudget, UnitView


class Forecaster(nn.Module):
    """Linear(D, r) -> activation -> Linear(r, D) on the unit's normalised input.

    Float32 parameters, initialised N(0, 1e-3) with zero biases as in the published code of
    informed routing (arXiv 2510.13831); with `identity` it is the closed form's linear map.

    Args:
        neurons: so many of an MLP's own run beside the two maps.

    Raises:
        ValueError: a rank outside 1..D.
    """

    def __init__(
        self, *, width: int, rank: int, activation: Activation = "silu", neurons: int = 0
    ) -> None:
        super().__init__()
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
        """Compute the bottleneck, float32 [..., r]."""
        code: Tensor = self.activation(self.down(x.float()))
        return code

    @torch.no_grad()
    def set_linear(self, down_Dr: Tensor, up_rD: Tensor, bias_D: Tensor) -> None:
        """Make the map x @ down @ up + bias; exact only with the identity activation."""
        self.down.weight.copy_(down_Dr.T)
        self.down.bias.zero_()
        self.up.weight.copy_(up_rD.T)
        self.up.bias.copy_(bias_D)


class Forecasters(PerSite[Forecaster]):
    """One forecaster per site, and the two ways to fit them.

    Args:
        rank: r of every forecaster; their mean with `allocate`.
        options: of the fit.
        neurons: that the forecaster of an MLP keeps of its own, at most all.
        allocate: closed form with the total rank spent where it avoids the most loss instead of
            equally: a direction's worth is the output variance that it explains times the square
            of the unit's loss sensitivity.
    """

    def __init__(
        self,
        *,
        rank: int,
        options: ForecasterOptions = CLOSED_FORM,
        neurons: int = 0,
        allocate: bool = False,
    ) -> None:
        super().__init__()
        self.rank, self.neurons, self.allocate = rank, neurons, allocate
        self.fit, self.lr, self.damping = options.fit, options.lr, options.damping
        closed = options.fit == "closed_form"
        self.activation: Activation = options.activation or ("identity" if closed else "silu")

    def create(self, sites: Sequence[Site], shape: Shape) -> None:
        """Build one forecaster for each site; [.., D] -> [.., D]."""
        self.width, self.kept = shape.width, min(self.neurons, shape.mlp_width)
        for site in sites:
            self._put(site.key, self.rank)

    def resize(self, site: Site, rank: int) -> None:
        """Give a site's forecaster another rank; it starts anew if that differs from its own."""
        if self.at(site).rank != rank:
            self._put(site.key, rank)

    def adopt(self, shapes: Mapping[str, Sequence[int]], prefix: str) -> None:
        """Take the ranks of saved `<prefix>modules_by_site.<key>.down.weight`, [r, D]."""
        for key, forecaster in self.modules_by_site.items():
            shape = shapes.get(f"{prefix}modules_by_site.{key}.down.weight")
            if shape is not None and 1 <= shape[0] <= self.width and shape[0] != forecaster.rank:
                self._put(key, int(shape[0]))

    def stage(self, budget: StageBudget, solve: Callable[[Probe], None] | None = None) -> Stage:
        """The stage that fits all forecasters, by `solve` if closed; shared by all targets."""
        report = self.explained_variance
        if self.fit == "closed_form":
            held = 2 * 8 * self.width**2 * len(self.modules_by_site)  # two D x D doubles a site
            return Stage("forecasters", fit=solve or self.solve, fit_bytes=held, report=report)
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
        """Closed form: choose the neurons, stream one dense pass, solve each site in float64.

        The regression is of what the neurons leave of the output.
        """
        kept = {site: self.at(site).neurons for site in probe.shape.units() if site in self}
        keep_neurons(probe, {site: own for site, own in kept.items() if own is not None})

        def pair(view: UnitView) -> tuple[Tensor, Tensor]:
            return view.x_ND, self.at(view.site).remainder(view.x_ND, view.y_ND)

        moments = site_moments(probe, pair, self)
        solved: dict[Site, Components] = {}
        for site in list(moments):  # each is let go once solved: they are the memory of the fit
            solved[site] = moments.pop(site).components(self.damping)
        ranks = dict.fromkeys(solved, self.rank)
        if self.allocate:
            slopes = probe.sensitivity()
            ranks = allocated({s: c.values * slopes[s] ** 2 for s, c in solved.items()}, ranks)
        for site, rank in ranks.items():
            self.resize(site, rank)
            self.at(site).set_linear(*solved[site].take(rank))

    def explained_variance(self, probe: Probe) -> dict[str, float]:
        """Measure 1 - residual / total variance on a share of the calibration text.

        Returns:
            `explained_variance_<kind>`: the mean over the sites of a kind.
        """
        sums: dict[Site, list[Tensor]] = {}

        def visit(view: UnitView) -> None:
            if view.site not in self:
                return
            y = view.y_ND.double()
            error = y - self(view.site, view.x_ND).double()
            count = torch.tensor(float(len(y)), device=y.device)
            new = [count, y.sum(0), y.square().sum(), error.square().sum()]
            old = sums.get(view.site, [0.0] * len(new))
            sums[view.site] = [a + b for a, b in zip(old, new, strict=True)]

        probe.sample().stream(visit, split="calibration")
        kinds: dict[str, list[float]] = {}
        for site, (count, total, squares, error) in sums.items():
            deviation = squares - total.square().sum() / count
            kinds.setdefault(site.kind, []).append(float(1 - error / deviation))
        return {f"explained_variance_{k}": sum(v) / len(v) for k, v in kinds.items()}

    def _put(self, key: str, rank: int) -> None:
        made = Forecaster(
            width=self.width,
            rank=rank,
            activation=self.activation,
            neurons=self.kept if key.endswith("mlp") else 0,
        )
        if key in self.modules_by_site:
            old = cast(Forecaster, self.modules_by_site[key])
            made = made.to(old.up.weight.device)
            made.neurons = old.neurons
        self.modules_by_site[key] = made

    def _regression_loss(self, view: UnitView) -> Tensor:
        """SmoothL1 of forecast and output (published code of informed routing, stage 1)."""
        if view.site not in self:
            return view.x_ND.new_zeros((), dtype=torch.float32)
        return functional.smooth_l1_loss(self(view.site, view.x_ND).float(), view.y_ND.float())
