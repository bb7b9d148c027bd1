"""The oracle: looks at what a bypass would miss before it decides. An upper bound, no contender."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from methods.base import Budget, Probe, RouteContext, Shape, Site, Stage
from methods.options import Count, ForecasterOptions, Positive, Sparsity
from methods.parts.forecaster import Forecasters
from methods.parts.routed_method import RoutedMethod
from methods.parts.router_start import EPSILON


class Oracle(RoutedMethod):
    """Executes where log ||unit output - bypass|| is large: the true error on the routed stream.

    It is what a router that reads the unit's input tries to predict; the distance of a method to
    the oracle with the same bypass is the regret of its router. Its decisions are counted as free
    although it runs every unit, so its FLOPs are those of a router without cost.

    Args:
        bypass: `forecast` (closed-form forecasters, as `informed`) or `skip`.
        rank: of the forecasters.
        damping: of their ridge regression.
        sensitivity: add the log of the unit's root mean square loss gradient, so that one
            threshold compares units by their expected harm.
    """

    paper = "none: an upper bound"
    upper_bound = True
    log_sensitivity: Tensor

    def __init__(
        self,
        *,
        sparsity: Sparsity,
        bypass: Literal["forecast", "skip"] = "forecast",
        rank: Count = 64,
        damping: Positive = 1e-3,
        sensitivity: bool = True,
    ) -> None:
        options = ForecasterOptions(damping=damping)
        forecasters = Forecasters(rank=rank, options=options) if bypass == "forecast" else None
        super().__init__(sparsity=sparsity, forecasters=forecasters)
        self.sensitivity = sensitivity

    def setup(self, shape: Shape) -> None:
        super().setup(shape)
        self.register_buffer("log_sensitivity", torch.zeros(len(self.sites())))
        self.place = {site: i for i, site in enumerate(self.sites())}

    def score(self, site: Site, x_BTD: Tensor, ctx: RouteContext) -> Tensor:
        assert ctx.output is not None, "an oracle needs the unit's output"
        error = ctx.output().float()
        if self.forecasters is not None:
            error = error - self.forecasters(site, x_BTD).float()
        scores = (error.norm(dim=-1) + EPSILON).log()
        return scores + self.log_sensitivity[self.place[site]]

    def stages(self, budget: Budget) -> Iterable[Stage]:
        if self.forecasters is not None:
            yield self.forecasters.stage(budget.forecasters)
        if self.sensitivity:
            yield Stage("sensitivity", fit=self._measure)

    def _measure(self, probe: Probe) -> None:
        slopes = probe.sensitivity()
        logs = [math.log(max(slopes[site], 1e-30)) for site in self.sites()]
        self.log_sensitivity.copy_(torch.tensor(logs))
