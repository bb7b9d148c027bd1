"""Random routing: the floor that every router has to beat."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from methods.base import Budget, RouteContext, Site, Stage
from methods.options import Count, Natural, Sparsity
from methods.parts.forecaster import Forecasters
from methods.parts.routed_method import RoutedMethod


class Random(RoutedMethod):
    """Each (token, unit) pair is bypassed with probability `sparsity`, independently.

    The draw is a hash of (seed, layer, kind, position): the same in prefill, in decode, in any
    batch and with any padding, so evaluation stays deterministic and causal.
    """

    def __init__(
        self,
        *,
        sparsity: Sparsity,
        seed: Natural = 0,
        bypass: Literal["skip", "forecast"] = "skip",
        rank: Count = 64,
    ) -> None:
        forecasters = Forecasters(rank=rank) if bypass == "forecast" else None
        super().__init__(sparsity=sparsity, forecasters=forecasters)
        self.seed = seed

    def score(self, site: Site, x_BTD: Tensor, ctx: RouteContext) -> Tensor:
        return uniform(site, ctx.positions_BT, self.seed)

    def stages(self, budget: Budget) -> Iterable[Stage]:
        return [] if self.forecasters is None else [self.forecasters.stage(budget.forecasters)]


def uniform(site: Site, positions_BT: Tensor, seed: int) -> Tensor:
    """Float32 in [0, 1) from an integer hash (multiply and xor-shift on 32 bits)."""
    lane = 2 * site.layer + (site.kind == "mlp")
    state = (positions_BT.long() + 1) * 0x9E3779B1 + (lane + 1) * 0x85EBCA77 + seed * 0xC2B2AE3D
    for factor in (0x7FEB352D, 0x846CA68B):
        state = state & 0xFFFFFFFF
        state = (state ^ (state >> 16)) * factor
    state = state & 0xFFFFFFFF
    return ((state ^ (state >> 15)) >> 8).to(torch.float32) / float(1 << 24)
