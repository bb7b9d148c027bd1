"""Random routing: the floor that every router has to beat."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from methods.base import Budget, Decision, Method, RouteContext, Shape, Site, SiteCost, Stage
from methods.parts.forecaster import Forecasters


class Random(Method):
    """Each (token, unit) pair is bypassed with probability `sparsity`, independently.

    The draw is a hash of (seed, layer, kind, position): the same in prefill, in decode, in any
    batch and with any padding, so evaluation stays deterministic and causal.
    """

    def __init__(
        self,
        *,
        sparsity: float,
        seed: int = 0,
        bypass: Literal["skip", "forecast"] = "skip",
        rank: int = 64,
    ) -> None:
        super().__init__(sparsity=sparsity)
        self.seed = seed
        self.forecasters = Forecasters(rank=rank) if bypass == "forecast" else None

    def setup(self, shape: Shape) -> None:
        super().setup(shape)
        if self.forecasters is not None:
            self.forecasters.create(self.sites(), shape.width)

    def route(self, site: Site, x_BTD: Tensor, ctx: RouteContext) -> Decision:
        return self.decide(uniform(site, ctx.positions_BT, self.seed))

    def approximate(self, site: Site, x_BTD: Tensor) -> Tensor | None:
        return None if self.forecasters is None else self.forecasters(site, x_BTD)

    def cost(self, site: Site) -> SiteCost:
        if self.forecasters is None:
            return SiteCost()
        return SiteCost(approximate=self.forecasters.flops_per_token(site))

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
