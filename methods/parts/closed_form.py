"""Forecasters without a gradient: reduced-rank regression of each unit's output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from methods.parts.ridge import Components, Moments
from methods.types import Probe, Site, UnitView

if TYPE_CHECKING:
    from methods.parts.forecaster import Forecasters


def fit_closed_form(
    probe: Probe, forecasters: Forecasters, *, damping: float, allocate: bool = False
) -> None:
    """One dense pass, then one float64 solve per site.

    Memory is 2 D² doubles a site. Where a forecaster keeps neurons, the regression is of what they
    leave of the output.

    Args:
        allocate: spend the total rank where it avoids the most loss instead of equally: a
            direction's worth is the output variance that it explains times the square of the
            unit's loss sensitivity.
    """
    moments = dense_moments(probe, forecasters)
    solved: dict[Site, Components] = {}
    for site in list(moments):
        solved[site] = moments.pop(site).components(damping)
    ranks = dict.fromkeys(solved, forecasters.rank)
    if allocate:
        slopes = probe.sensitivity()
        ranks = allocated({s: c.values * slopes[s] ** 2 for s, c in solved.items()}, ranks)
    for site, rank in ranks.items():
        forecasters.resize(site, rank)
        forecasters.at(site).set_linear(*solved[site].take(rank))


def dense_moments(probe: Probe, forecasters: Forecasters) -> dict[Site, Moments]:
    """Sums of (input, output) of every forecast unit under the dense forward."""
    moments: dict[Site, Moments] = {}

    def visit(view: UnitView) -> None:
        if view.site in forecasters:
            left = forecasters.at(view.site).remainder(view.x_ND, view.y_ND)
            _moments_at(moments, view).add(view.x_ND, left)

    probe.stream(visit)
    return moments


def refit_on_routed(
    probe: Probe,
    forecasters: Forecasters,
    *,
    damping: float,
    executed_weight: float = 0.1,
) -> None:
    """Solve again on the stream that forecasts have already changed, for tokens that bypass.

    Forecasts upstream shift the inputs of the units downstream, and a router keeps its forecaster
    from the tokens that it executes: both differ from the dense fit's text.

    Args:
        executed_weight: of the tokens that the router executes, relative to the bypassed ones:
            a prior for units that hardly any token bypasses.
    """
    moments: dict[Site, Moments] = {}

    def visit(view: UnitView) -> None:
        assert view.execute_N is not None
        if view.site in forecasters:
            weight = torch.ones_like(view.execute_N, dtype=torch.float32)
            weight[view.execute_N] = executed_weight
            left = forecasters.at(view.site).remainder(view.x_ND, view.y_ND)
            _moments_at(moments, view).add(view.x_ND, left, weight)

    probe.stream_routed(visit)
    for site in list(moments):
        solved = moments.pop(site).components(damping)
        forecasters.at(site).set_linear(*solved.take(forecasters.at(site).rank))


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
    for site, more in zip(
        sites, torch.bincount(owner[best.cpu()], minlength=len(sites)).tolist(), strict=True
    ):
        chosen[site] += more
    return chosen


def _moments_at(moments: dict[Site, Moments], view: UnitView) -> Moments:
    if view.site not in moments:
        width = view.x_ND.shape[-1]
        moments[view.site] = Moments(inputs=width, outputs=width, device=view.x_ND.device)
    return moments[view.site]
