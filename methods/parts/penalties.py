"""Losses that hold the realised sparsity near its target."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from methods.types import Site


def sparsity_penalty(execute_rate: Tensor, sparsity: float, *, weight: float) -> Tensor:
    """weight * |(1 - sparsity) - mean execute rate| (informed routing, stage 2; SkipGPT)."""
    return weight * ((1.0 - sparsity) - execute_rate).abs()


def capacity_penalty(rates: Iterable[Tensor], target: float, *, weight: float) -> Tensor:
    """weight * sum over units of relu(execute rate - target) (Router-Tuning, arXiv 2410.13184).

    Nothing pulls a unit up that executes less than its target.
    """
    return weight * torch.stack([torch.relu(rate - target) for rate in rates]).sum()


def token_rate_penalty(
    gates: Mapping[Site, Tensor], counted_BT: Tensor, sparsity: float, *, units: int, weight: float
) -> Tensor:
    """weight * mean over tokens of |mean over units of the gate - (1 - sparsity)| (D-LLM).

    Args:
        gates: per routed site, [B, T]; units of no site count as executed.
        counted_BT: tokens that the mean runs over.
        units: of the whole model.
    """
    bypassed = torch.stack([(1.0 - g) * len(site.units) for site, g in gates.items()]).sum(0)
    return weight * (sparsity - bypassed / units).abs()[counted_BT].mean()


def depth_penalty(gates: Iterable[Tensor], valid_BT: Tensor, *, weight: float) -> Tensor:
    """weight * mean over tokens of (sum over sites of the gate) squared (FlexiDepth, HeRo)."""
    depth = torch.stack(list(gates)).sum(0)
    return weight * depth.square()[valid_BT].mean()
