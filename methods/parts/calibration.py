"""Find the threshold at which the routed model realises the target sparsity."""

from __future__ import annotations

import logging
import math
from typing import NamedTuple

import torch
from torch import Tensor

from methods.types import OutOfReach, Probe, RoutedScores

log = logging.getLogger(__name__)

MOST_PASSES = 16
FIRST_SHARE = 0.125
"""Of the calibration text, on which the search begins."""


class Found(NamedTuple):
    """A threshold, and what the routed model realised with it."""

    threshold: float
    sparsity: float
    saved: float = 0.0
    """Share of the dense FLOPs."""


def weighted_quantile(values: Tensor, weights: Tensor, mass: float) -> float:
    """Smallest value v such that the weight of all values <= v reaches `mass`.

    Args:
        values: float, [N].
        weights: float, [N], positive.
        mass: in units of the weights; below the first weight gives the minimum.
    """
    ordered, index = values.sort()
    cumulated = weights[index].double().cumsum(0)
    place = int(
        torch.searchsorted(cumulated, torch.tensor(mass, dtype=torch.float64).to(values.device))
    )
    return float(ordered[min(place, len(ordered) - 1)])


def between_scores(scores: Tensor, guess: float) -> float:
    """Middle of the gap between two scores in which `guess` lies: the same decisions.

    A guess is often a score itself, and there the last bit decides, which differs between the
    ways in which a unit is computed; in layer 0 it decides for every occurrence of a token.
    """
    known = scores[scores.isfinite()].double()
    below, above = known[known <= guess], known[known > guess]
    if not len(below):
        return guess
    low = float(below.max())
    return (low + float(above.min())) / 2 if len(above) else low + 1e-3 * max(1.0, abs(low))


def calibrate_threshold(probe: Probe, sparsity: float, *, tolerance: float = 0.002) -> Found:
    """Find the threshold on a share of the calibration text, then on all of it.

    The second search seldom needs more than two passes.

    Args:
        probe: routes calibration text.
        sparsity: target over all units of the model.
        tolerance: accepted distance between realised and target sparsity.

    Raises:
        OutOfReach: the routed sites cannot reach the target even if all are bypassed.
    """
    if sparsity == 0.0:
        return Found(-math.inf, 0.0)
    part = probe.sample(FIRST_SHARE)
    found = realising_threshold(part, sparsity, tolerance=4 * tolerance)
    if part is probe:
        return found
    return realising_threshold(probe, sparsity, tolerance=tolerance, near=found.threshold)


def realising_threshold(
    probe: Probe,
    sparsity: float,
    *,
    tolerance: float,
    near: float | None = None,
    saved: float | None = None,
) -> Found:
    """Bisection on the routed model, each guess taken from the scores that the last pass saw.

    The bracket [low, high] always encloses the answer; the quantile of the observed scores is
    tried where it falls inside, which needs 2 to 5 passes where plain halving needs about 12. The
    closest threshold seen is returned after `MOST_PASSES`.

    Args:
        near: a threshold that should be close, which saves the passes that find one.
        saved: share of the dense FLOPs to be saved, whatever the sparsity is then.

    Raises:
        OutOfReach: as `calibrate_threshold`.
    """
    low, high = -math.inf, math.inf
    if near is None:
        seen = probe.routed_scores(-math.inf)
        routed = float(seen.weights[seen.scores < math.inf].sum())
        reachable = (routed + seen.fixed_weight) / seen.total_weight
        if sparsity > reachable + tolerance:
            raise OutOfReach(
                f"sparsity {sparsity} is out of reach: this method routes {reachable:.3f} of all "
                "units of the calibration text (what it reserves, as first layers or tokens, left "
                "out)"
            )
        near = _next_guess(seen, sparsity, low, high, halve=False)
    guess, best, closest = near, Found(near, math.inf), math.inf
    for passes in range(MOST_PASSES):
        seen = probe.routed_scores(guess)
        if saved is not None:  # a unit saves about its share of the FLOPs
            sparsity = seen.sparsity + saved - (1.0 - seen.flops_ratio)
        error = seen.sparsity - sparsity
        log.debug("pass %d: threshold %.6g realised %.4f", passes, guess, seen.sparsity)
        if abs(error) < closest:
            closest = abs(error)
            between = between_scores(seen.scores, guess)
            best = Found(between, seen.sparsity, 1.0 - seen.flops_ratio)
        if abs(error) <= tolerance:
            break
        low, high = (low, guess) if error > 0 else (guess, high)
        guess = _next_guess(seen, sparsity, low, high, halve=passes % 3 == 2)
    return best


def _next_guess(
    seen: RoutedScores, sparsity: float, low: float, high: float, *, halve: bool
) -> float:
    bounded = math.isfinite(low) and math.isfinite(high)
    mass = sparsity * seen.total_weight - seen.fixed_weight
    guess = weighted_quantile(seen.scores, seen.weights, mass)
    if low < guess < high and not (halve and bounded):
        return guess
    if bounded:
        return (low + high) / 2
    spread = float(seen.scores[seen.scores.isfinite()].std()) or 1.0
    return low + spread / 4 if math.isfinite(low) else high - spread / 4
