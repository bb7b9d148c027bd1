"""Least squares from streamed sufficient statistics: full, reduced-rank, single output."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from methods.types import Probe, Site, UnitView

Pair = tuple[Tensor, Tensor]


class Moments:
    """Streaming sums for a linear regression of Y on X; float32 products, solved in float64.

    Args:
        inputs: D, outputs: P.
        dtype: of the totals.
    """

    def __init__(
        self, *, inputs: int, outputs: int, device: torch.device, dtype: torch.dtype = torch.float64
    ) -> None:
        self.count = 0
        self.x = torch.zeros(inputs, dtype=dtype, device=device)
        self.y = torch.zeros(outputs, dtype=dtype, device=device)
        self.xx = torch.zeros(inputs, inputs, dtype=dtype, device=device)
        self.xy = torch.zeros(inputs, outputs, dtype=dtype, device=device)

    def add(self, x_ND: Tensor, y_NP: Tensor) -> None:
        """Add N observations, any float dtype."""
        x, y = x_ND.float(), y_NP.float()
        self.count += len(x)
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.xx += x.T @ x
        self.xy += x.T @ y

    def ridge(self, damping: float) -> tuple[Tensor, Tensor, Tensor]:
        """Centred ridge solution in float64.

        Args:
            damping: penalty relative to the mean diagonal of the covariance of X.

        Returns:
            W [D, P] and b [P] with Y ~ X W + b, and the Cholesky factor L of the damped
            covariance sum, L Lᵀ = XᵀX + lambda I.
        """
        n = max(self.count, 1)
        mean_x, mean_y = self.x.double() / n, self.y.double() / n
        cov = self.xx.double() - n * torch.outer(mean_x, mean_x)
        cross = self.xy.double() - n * torch.outer(mean_x, mean_y)
        penalty = damping * cov.diagonal().mean().clamp_min(1e-12)
        cov.diagonal().add_(penalty)
        factor = torch.linalg.cholesky(cov)
        weight = torch.cholesky_solve(cross, factor)
        return weight, mean_y - mean_x @ weight, factor

    def components(self, damping: float) -> Components:
        """Reduced-rank ridge regression, all ranks at once.

        With W the ridge solution, the best map of rank r for the penalised squared error is
        W V Vᵀ, where V holds the top r eigenvectors of the fitted covariance
        Wᵀ (XᵀX + lambda I) W (Izenman 1975; Mukherjee and Zhu 2011).
        """
        weight, _, factor = self.ridge(damping)
        fitted = factor.T @ weight
        values, vectors = torch.linalg.eigh(fitted.T @ fitted)
        n = max(self.count, 1)
        means = self.x.double() / n, self.y.double() / n
        return Components(weight, vectors, values / n, *means)


@dataclass(frozen=True)
class Components:
    """Directions of a reduced-rank regression, the worst first; float64."""

    weight: Tensor
    """W, [D, P]."""
    vectors: Tensor
    """V in ascending order of `values`, [P, P]."""
    values: Tensor
    """[P]: the squared error per observation that each direction avoids."""
    mean_x: Tensor
    mean_y: Tensor

    def take(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """The map of the best `rank` directions: down [D, r], up [r, P], bias [P]."""
        top = self.vectors[:, -rank:]
        down = self.weight @ top
        return down, top.T.contiguous(), self.mean_y - self.mean_x @ down @ top.T


def at_sites(
    visit: Callable[[UnitView], None], sites: Container[Site]
) -> Callable[[UnitView], None]:
    """Visit the units of `sites` alone, a block as one: its input, and what both halves add."""
    attention: dict[int, UnitView] = {}

    def seen(view: UnitView) -> None:
        layer, kind = view.site
        if view.site in sites:
            visit(view)
        elif Site(layer, "block") in sites and kind == "attention":
            attention[layer] = view
        elif Site(layer, "block") in sites:
            first = attention.pop(layer)
            total_ND = first.y_ND + view.y_ND
            residual_ND = first.residual_ND
            visit(UnitView(Site(layer, "block"), first.x_ND, total_ND, residual_ND, residual_ND))

    return seen


def site_moments(
    probe: Probe,
    pair: Callable[[UnitView], Pair],
    sites: Container[Site],
    *,
    dtype: torch.dtype = torch.float64,
) -> dict[Site, Moments]:
    """Sum (input [N, D], output [N, P]) of each of the sites, in one dense pass."""
    moments: dict[Site, Moments] = {}

    def visit(view: UnitView) -> None:
        x, y = pair(view)
        if view.site not in moments:
            sizes = {"inputs": x.shape[-1], "outputs": y.shape[-1]}
            moments[view.site] = Moments(**sizes, device=x.device, dtype=dtype)
        moments[view.site].add(x, y)

    probe.stream(at_sites(visit, sites))
    return moments


def allocated(
    gains: Mapping[Site, Tensor],
    ranks: Mapping[Site, int],
    *,
    least: float = 0.25,
    most: float = 4.0,
) -> dict[Site, int]:
    """Move rank to where it gains most, the total kept, within bounds at every site.

    Directions are independent and each costs the same, so the best choice is the largest gains.

    Args:
        gains: per site, ascending: what each direction is worth, in one unit for all sites.
        ranks: equal shares.
        least, most: bounds relative to a site's equal share.
    """
    sites = list(ranks)
    chosen = {s: max(1, round(least * ranks[s])) for s in sites}
    high = {s: min(len(gains[s]), round(most * ranks[s])) for s in sites}
    optional = [gains[s].flip(0)[chosen[s] : high[s]] for s in sites]
    owner = torch.cat([torch.full((len(o),), i) for i, o in enumerate(optional)])
    spare = sum(ranks.values()) - sum(chosen.values())
    best = torch.cat(optional).argsort(descending=True, stable=True)[:spare]
    more = torch.bincount(owner[best.cpu()], minlength=len(sites)).tolist()
    return {site: chosen[site] + extra for site, extra in zip(sites, more, strict=True)}
