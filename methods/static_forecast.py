"""Static forecasts: the same units are forecast for every token, and never run."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from methods.base import Budget, LinearUnit, Probe, RoutedView, Shape, Site, Stage
from methods.options import (
    Count,
    ForecasterOptions,
    LoraSpec,
    Positive,
    Sparsity,
    Training,
    grouped,
)
from methods.parts.forecaster import Forecasters
from methods.parts.routed_method import RoutedMethod
from methods.parts.static_order import (
    best_cuts,
    count_below,
    expected_harm,
    greedy_loss,
    split_by_loss,
)

FORECASTER, TRAINING = ForecasterOptions(), Training()
Order = Literal["expected_harm", "greedy_loss", "contiguous"]


class StaticForecast(RoutedMethod):
    """Execute-or-approximate decided once for all tokens: what routing tokens has to beat.

    The forecasters are those of informed routing (arXiv 2510.13831), in closed form. A target
    bypasses the first so many units of an order, and then the forecasters of these are distilled.
    Nothing is routed or gathered, and a bypassed attention has no keys and values.

    Args:
        order: `expected_harm` is the mean log error of a unit's forecast plus the log of its loss
            sensitivity, least first: the score of informed routing's start, averaged over tokens;
            `greedy_loss` adds the unit whose forecast raises the LM loss least (forward
            selection, the forecasts of the others in place); `contiguous` is the one block of
            layers that turns the residual stream least (arXiv 2403.17887).
        kind_split: of `expected_harm`: how many of the bypassed units are MLPs is found on the LM
            loss, as `kind_shift` of informed routing does; else harms of both kinds are compared.
        rank: of the forecasters.
        forecaster: `ForecasterOptions`: how they are fitted.
        tokens: training text that `kind_split` and `greedy_loss` score each candidate on.
        group: units that a round of `greedy_loss` takes.
        candidates: units that a round tries, of both kinds in turn by expected harm.
        train: `forecasters` distils them, `none` keeps the closed form.
        targets: train one set of forecasters for these sparsities in turn, shared by all points
            of a sweep; empty trains for the point's own.
        training: `Training`: the options of that stage.
        lora: adapters that heal the model afterwards (`LoraSpec` fields), or None.
        lora_lr: of that stage.
    """

    paper = "arXiv 2510.13831, 2403.17887"
    maps: Tensor
    """bool [units + 1, units]: row n bypasses n units."""

    def __init__(
        self,
        *,
        sparsity: Sparsity,
        order: Order = "expected_harm",
        rank: Count = 64,
        forecaster: ForecasterOptions = FORECASTER,
        kind_split: bool = True,
        tokens: Count = 1024,
        group: Count = 6,
        candidates: Count = 12,
        train: Literal["none", "forecasters"] = "none",
        targets: Sequence[Sparsity] = (),
        training: Training = TRAINING,
        lora: LoraSpec | None = None,
        lora_lr: Positive = 2e-4,
    ) -> None:
        options = grouped(forecaster, FORECASTER)
        super().__init__(
            sparsity=sparsity,
            forecasters=Forecasters(rank=rank, options=options),
            training=grouped(training, TRAINING),
            targets=targets,
            lora=lora,
            lora_lr=lora_lr,
        )
        self.order, self.damping, self.trains = order, options.damping, train == "forecasters"
        self.kind_split = kind_split
        self.tokens, self.group, self.candidates = tokens, group, max(group, candidates)

    def setup(self, shape: Shape) -> None:
        super().setup(shape)
        units = len(shape.units())
        self.register_buffer("maps", torch.ones(units + 1, units, dtype=torch.bool).tril(-1))

    def fixed(self) -> Mapping[Site, bool]:
        """Bypass the units of the map for so many as lie below the threshold."""
        sites = self.sites()
        bypassed = self.maps[count_below(self.threshold, len(sites))].tolist()
        return {site: not away for site, away in zip(sites, bypassed, strict=True)}

    def estimated(self) -> Collection[Site]:
        return [site for site, executes in self.fixed().items() if not executes]

    def linear(self, site: Site) -> LinearUnit | None:
        return self.linear_unit(site)

    def stages(self, budget: Budget) -> Iterable[Stage]:
        """Forecasters, the order of the units, their distillation, then (optionally) LoRA."""
        assert self.forecasters is not None
        yield self.forecasters.stage(budget.forecasters)
        yield Stage("order", fit=self._rank)
        if self.trains:
            yield self.train_stage(
                "train_forecasters", [self.forecasters], budget.routers, hard=True
            )
        yield from self.lora_stages(budget)

    def calibrate(self, probe: Probe, sparsity: float) -> None:
        """Bypass the nearest possible number of units."""
        self.threshold.fill_(self._count(sparsity) - 0.5)

    def achievable(self, sparsity: float) -> float:
        """Nearest sparsity that a whole number of units, or of layers, gives."""
        return self._count(sparsity) / len(self.sites())

    def _count(self, sparsity: float) -> int:
        units = len(self.sites())
        if self.order == "contiguous":  # the first layer stays
            return 2 * min(round(sparsity * units / 2), units // 2 - 1)
        return round(sparsity * units)

    def _rank(self, probe: Probe) -> None:
        assert self.forecasters is not None
        sites = list(self.sites())
        self.maps.zero_()
        if self.order == "contiguous":
            for layers, first in enumerate(best_cuts(probe)):
                self.maps[2 * layers : 2 * layers + 2, 2 * first : 2 * (first + layers)] = True
            return
        harm = expected_harm(probe, self.forecasters)
        order = sorted(sites, key=harm.__getitem__)

        def loss(bypassed: list[Site]) -> float:
            self._bypass(bypassed)
            self.calibrate(probe, len(bypassed) / len(sites))
            return probe.routed_loss(self.tokens)

        attention, mlps = ([s for s in order if s.kind == kind] for kind in ("attention", "mlp"))
        if self.order == "greedy_loss":
            both = [site for pair in zip(attention, mlps, strict=True) for site in pair]
            order = greedy_loss(both, loss, group=self.group, candidates=self.candidates)
        maps = [order[:count] for count in range(len(order) + 1)]
        if self.order == "expected_harm" and self.kind_split:
            maps = split_by_loss(attention, mlps, loss)
        for bypassed in maps:
            self._bypass(bypassed)

    def _bypass(self, sites: Sequence[Site]) -> None:
        """Make these the map of so many units."""
        row = [site in sites for site in self.sites()]
        self.maps[len(sites)] = torch.tensor(row, device=self.maps.device)

    def _routed_loss(self, view: RoutedView) -> Tensor:
        return view.task_loss
