"""The balanced constraint: attention and MLP units bypass the same share of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from methods.base import Probe, RoutedView
from methods.parts.calibration import weighted_quantile

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
