"""Aim at a share of the dense FLOPs that is saved, where a target is no share of bypassed units.

Every method knows its sparsity alone. What that saves is counted with everything that is executed:
LM head, keys and values of bypassed tokens, routers, estimates.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

from methods.base import Method, OutOfReach, Probe, RoutedScores, Site
from methods.engine.measure.counters import Usage
from methods.engine.measure.flops import flops_ratio

log = logging.getLogger(__name__)

TOLERANCE = 0.003
"""Accepted distance of the saved share from the target."""
MOST_CALIBRATIONS = 6
HALVINGS = 40
STEP = 0.02
"""Of a sparsity, over which the slope of what it saves is taken."""
SLACK = 0.02
"""By which the estimate before training may miss what can be saved at most."""


class Saved(NamedTuple):
    """A target in FLOPs."""

    share: float
    """Of the dense FLOPs, that is saved."""
    row: int
    """Tokens of a text."""


def sparsity_saving(method: Method, saved: float, row: int) -> float:
    """Estimate the sparsity that saves this share of FLOPs, before anything is trained.

    Args:
        method: set up for its model.
        saved: share of the dense FLOPs.
        row: tokens of a text.

    Raises:
        OutOfReach: routers and estimates cost too much for that, even if all is bypassed.
    """
    low, high = 0.0, method.reach()
    most = estimated_saving(method, high, row)
    if saved > most + SLACK:
        raise OutOfReach(
            f"target=flops sparsity={saved:g} is out of reach: with every routed unit bypassed "
            f"this method saves {most:.3f} of the dense FLOPs"
        )
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if estimated_saving(method, middle, row) < saved else (low, middle)
        )
    return round(min(high, 0.999), 4)


def estimated_saving(method: Method, sparsity: float, row: int) -> float:
    """Count what is saved if all sites bypass the same share of tokens, or of themselves."""
    assert method.shape is not None
    share = min(sparsity / max(method.reach(), 1e-9), 1.0)
    context = row * (row + 1) // 2
    usage = Usage(shape=method.shape, tokens=row, context=context, forwards=1)
    sites = list(method.sites())
    if method.flops_only:  # every token takes every unit in part, as its sparsity says
        return _saved_in_part(method, sparsity, usage)
    if method.static():
        away = [site for i, site in enumerate(sites) if int((i + 1) * share) > int(i * share)]
        usage.dropped = frozenset(unit for site in away for unit in site.units)
        usage.estimated = frozenset(site for site in away if method.cost(site).approximate)
        usage.executed |= dict.fromkeys(usage.dropped, 0)
        usage.executed_context |= dict.fromkeys(usage.dropped, 0)
    else:
        for site in sites:
            _bypass(usage, site, share)
    return 1.0 - flops_ratio(method, usage)


def _saved_in_part(method: Method, sparsity: float, usage: Usage) -> float:
    before, method.sparsity = method.sparsity, sparsity
    usage.estimated = frozenset(method.sites())
    usage.executed |= dict.fromkeys(usage.estimated, 0)
    try:
        return 1.0 - flops_ratio(method, usage)
    finally:
        method.sparsity = before


def retarget(method: Method, sparsity: float) -> None:
    """Make a sparsity the method's own, unless it would route other sites than it has learned."""
    before, sites = method.sparsity, list(method.sites())
    method.sparsity = sparsity
    if list(method.sites()) != sites:
        method.sparsity = before


def _bypass(usage: Usage, site: Site, share: float) -> None:
    """Note that a share of the tokens bypasses a site."""
    usage.decided[site] = round(usage.tokens * (1.0 - share))
    for unit in site.units:
        usage.executed[unit] = usage.decided[site]
        usage.executed_context[unit] = round(usage.context * (1.0 - share))


def calibrate_saving(method: Method, probe: Probe, saved: float, row: int) -> dict[str, float]:
    """Calibrate the method at the sparsity that saves this share of FLOPs on calibration text.

    A search over sparsities, by the slope of the estimate: two or three calibrations. A method that
    moves in steps is left at the nearest one.

    Args:
        method: its `sparsity` is the first guess, and becomes the one that is found.

    Returns:
        `sparsity` that was asked of the method, `realised` and `flops_saved` on calibration text.

    Raises:
        OutOfReach: the sites cannot bypass as much as the first guess.
    """
    low, high, guess = 0.0, min(method.reach(), 0.999), method.sparsity
    tried: dict[float, float] = {}
    while guess not in tried and len(tried) < MOST_CALIBRATIONS:
        seen = _calibrated(method, probe, guess)
        found = tried[guess] = 1.0 - seen.flops_ratio
        if abs(found - saved) <= TOLERANCE:
            break
        low, high = (guess, high) if found < saved else (low, guess)
        slope = estimated_saving(method, guess + STEP, row) - estimated_saving(method, guess, row)
        step = (saved - found) * STEP / max(slope, 1e-3)
        guess = guess + step if low < guess + step < high else (low + high) / 2
    best = min(tried, key=lambda s: abs(tried[s] - saved))
    if best != next(reversed(tried)):
        seen = _calibrated(method, probe, best)
    retarget(method, best)
    if abs(tried[best] - saved) > 2 * TOLERANCE:
        said = "target=flops: asked to save %.3f of the dense FLOPs, the nearest found is %.3f"
        log.warning(said, saved, tried[best])
    return {"sparsity": best, "realised": seen.sparsity, "flops_saved": 1.0 - seen.flops_ratio}


def _calibrated(method: Method, probe: Probe, sparsity: float) -> RoutedScores:
    method.calibrate(probe, sparsity)
    return probe.routed_scores(float(method.threshold))
