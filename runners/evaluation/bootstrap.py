"""Spread of a perplexity over documents; without torch, so that checks start in a moment."""

from __future__ import annotations

import numpy as np


def bootstrap_interval(
    nll: np.ndarray, tokens: np.ndarray, samples: int, seed: int
) -> tuple[float, float]:
    """2.5 and 97.5 percentile of the perplexity when documents are drawn with replacement.

    Args:
        nll: sum of each document, nats.
        tokens: scored tokens of each document, all positive.
    """
    draws = np.random.default_rng(seed).integers(0, len(nll), size=(samples, len(nll)))
    values = np.exp(nll[draws].sum(axis=1) / tokens[draws].sum(axis=1))
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
