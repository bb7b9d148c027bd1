"""Forecasters without a gradient: reduced-rank regression of each unit's output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from methods.base import Probe, Site, UnitView
from methods.parts.ridge import Components, Moments

if TYPE_CHECKING:
    from methods.parts.forecaster import Forecasters


def fit_closed_form(
    probe: Probe,
    forecasters: Forecasters,
    *,
    damping: float,
    metric: bool = False,
    allocate: bool = False,
) -> None:
    """One dense pass, then one float64 solve per site.

    Memory during the pass is 2 D² doubles a site, with `metric` D² floats more.

    Args:
        metric: weight errors by the loss's curvature at the unit's output (empirical Fisher), so
            that the rank goes to the directions that the loss feels.
        allocate: spend the total rank where it avoids the most error instead of equally.
    """
    moments = dense_moments(probe, forecasters)
    curvature = probe.gradient_moments() if metric else {}
    solved: dict[Site, Components] = {}
    for site in list(moments):
        solved[site] = moments.pop(site).components(damping, curvature.pop(site, None))
    ranks = dict.fromkeys(solved, forecasters.rank)
    if allocate:
        ranks = allocated({s: c.values for s, c in solved.items()}, forecasters.rank)
    for site, rank in ranks.items():
        forecasters.resize(site, rank)
        forecasters.at(site).set_linear(*solved[site].take(rank))


def dense_moments(probe: Probe, forecasters: Forecasters) -> dict[Site, Moments]:
    """Sums of (input, output) of every forecast unit under the dense forward."""
    moments: dict[Site, Moments] = {}

    def visit(view: UnitView) -> None:
        if view.site in forecasters:
            _moments_at(moments, view).add(view.x_ND, view.y_ND)

    probe.stream(visit)
    return moments


def refit_on_routed(
    probe: Probe,
    forecasters: Forecasters,
    *,
    damping: float,
    metric: bool = False,
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
            _moments_at(moments, view).add(view.x_ND, view.y_ND, weight)

    probe.stream_routed(visit)
    curvature = probe.gradient_moments() if metric else {}
    for site in list(moments):
        solved = moments.pop(site).components(damping, curvature.pop(site, None))
        forecasters.at(site).set_linear(*solved.take(forecasters.at(site).rank))


def allocated(
    gains: Mapping[Site, Tensor], mean_rank: int, *, least: float = 0.25, most: float = 4.0
) -> dict[Site, int]:
    """Ranks that avoid the most error for the same total, within bounds at every site.

    Directions are independent and each costs the same, so the best choice is the largest gains.

    Args:
        gains: per site, ascending: what each direction avoids, in one unit for all sites.
        mean_rank: the total is this times the number of sites.
        least, most: bounds relative to `mean_rank`.
    """
    sites = list(gains)
    low = max(1, round(least * mean_rank))
    high = {s: min(len(gains[s]), round(most * mean_rank)) for s in sites}
    ranks = dict.fromkeys(sites, low)
    optional = [gains[s].flip(0)[low : high[s]] for s in sites]
    owner = torch.cat([torch.full((len(o),), i) for i, o in enumerate(optional)])
    spare = max(0, mean_rank * len(sites) - low * len(sites))
    best = torch.cat(optional).argsort(descending=True, stable=True)[:spare]
    for index, count in enumerate(torch.bincount(owner[best.cpu()], minlength=len(sites)).tolist()):
        ranks[sites[index]] += count
    return ranks


def _moments_at(moments: dict[Site, Moments], view: UnitView) -> Moments:
    if view.site not in moments:
        width = view.x_ND.shape[-1]
        moments[view.site] = Moments(inputs=width, outputs=width, device=view.x_ND.device)
    return moments[view.site]
