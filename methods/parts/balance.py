"""How the bypassed share divides between attention and MLP units: equally, or as costs least."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from methods.parts.calibration import realising_threshold, weighted_quantile
from methods.parts.routers import Routers
from methods.types import Probe, RoutedView, Stage, middle

SHIFT_STEP = 0.3
"""Of the scores, which are logarithms: a factor of 1.35 in expected harm."""
MOST_SHIFTS = 6
TOLERANCE = 0.002
"""Accepted difference between the two kinds' realised sparsity."""


def balanced_penalty(view: RoutedView, *, weight: float) -> Tensor:
    """weight * mean over kinds of |(1 - s) - the kind's mean execute rate|."""
    kinds: dict[str, list[Tensor]] = {}
    for site, rate in view.site_rates.items():
        kinds.setdefault(site.kind, []).append(rate)
    means = torch.stack([torch.stack(rates).mean() for rates in kinds.values()])
    return weight * ((1.0 - view.sparsity) - means).abs().mean()


def balance_kinds(
    probe: Probe, mlp_offset: Tensor, sparsity: float, *, max_passes: int = 8
) -> None:
    """Find the shift of the MLP scores at which one threshold bypasses as much of each kind.

    Each pass routes the calibration text and takes both kinds' quantiles from the scores that it
    saw; decisions move the scores, so it repeats until the kinds agree.

    Args:
        mlp_offset: scalar that the method subtracts from its MLP scores; changed in place.
    """
    threshold = float("-inf")
    for _ in range(max_passes):
        seen = probe.routed_scores(threshold)
        quantiles, realised = [], []
        for kind in (~seen.is_mlp, seen.is_mlp):
            scores, weights = seen.scores[kind], seen.weights[kind]
            quantiles.append(weighted_quantile(scores, weights, sparsity * float(weights.sum())))
            realised.append(float((scores <= threshold).float().mean()))
        close = abs(realised[0] - realised[1]) <= TOLERANCE
        if close and abs(sum(realised) / 2 - sparsity) <= TOLERANCE:
            return
        threshold = quantiles[0]
        mlp_offset += quantiles[1] - quantiles[0]


def shift_stage(
    routers: Routers, threshold: Tensor, targets: Sequence[float], sparsity: float
) -> Stage:
    """`shift_kinds` as a stage: at the middle one of `targets`, or at the point's own target."""

    def fit(probe: Probe) -> None:
        shift_kinds(probe, routers, threshold, middle(targets, sparsity))

    return Stage("kind_shift", fit=fit, per_target=not targets)


def shift_kinds(probe: Probe, routers: Routers, threshold: Tensor, sparsity: float) -> None:
    """Move the MLP scores to where the routed model loses least at the target.

    A score is what one bypass costs by itself. Costs of the same kind add up to more than their
    sum along a token: a token that bypasses attention in every layer loses its context, which no
    single bypass shows. So the dense model's slopes favour bypassing one kind too much. This walks
    down the LM loss on calibration text in steps of `SHIFT_STEP`, at the exact sparsity.

    Args:
        routers: their heads are changed in place.
        threshold: the method's; left where the target is realised.
    """
    part = probe.sample()
    sites = [site for site in probe.shape.units() if site in routers]
    if not {"attention", "mlp"} <= {site.kind for site in sites}:
        return

    def move(amount: float) -> None:
        for site in sites:
            if site.kind == "mlp":
                routers.at(site).shift(amount)

    def loss(near: float | None = None) -> float:
        found = realising_threshold(part, sparsity, tolerance=2 * TOLERANCE, near=near)
        threshold.fill_(found.threshold)
        return part.routed_loss()

    best = loss()
    direction = -SHIFT_STEP
    for tried in range(MOST_SHIFTS):
        move(direction)
        found = loss(near=float(threshold) + direction / 2)
        if found < best:
            best = found
            continue
        move(-direction)
        if tried > 0 or direction > 0:
            return
        direction = SHIFT_STEP
