"""How much a block or a unit matters to every token alike: rankings for static depth."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from methods.parts.forecaster import Forecasters
from methods.parts.router_start import ROUTER_SHARE, log_error
from methods.types import Probe, Site, UnitView

ANCHORS = (0.25, 0.5, 0.75)
"""Shares of all units at which the split between attention and MLPs is found."""


def block_influence(probe: Probe) -> dict[Site, float]:
    """1 - mean cosine of the residual stream that enters and that leaves each layer.

    The Block Influence of ShortGPT (Men et al., arXiv 2403.03853, equation 1).
    """
    means = SiteMeans()
    entering: Tensor | None = None

    def visit(view: UnitView) -> None:
        nonlocal entering
        if view.site.kind == "attention":
            entering = view.residual_ND
            return
        assert entering is not None, "a layer's attention comes before its MLP"
        leaving = view.residual_ND + view.y_ND
        means.add(Site(view.site.layer, "block"), cosines(entering, leaving))

    probe.stream(visit, split="calibration")
    return {site: 1.0 - mean for site, mean in means.means().items()}


def unit_influence(probe: Probe) -> dict[Site, float]:
    """1 - mean cosine of x and x + unit(x) over tokens (LLM-Drop, arXiv 2406.15786, section 3)."""
    means = SiteMeans()
    probe.stream(
        lambda view: means.add(view.site, cosines(view.residual_ND, view.residual_ND + view.y_ND)),
        split="calibration",
    )
    return {site: 1.0 - mean for site, mean in means.means().items()}


def greedy_loss(
    sites: Sequence[Site],
    loss: Callable[[list[Site]], float],
    *,
    group: int = 1,
    candidates: int | None = None,
) -> list[Site]:
    """Order sites so that bypassing one more hurts the loss least (SLEB, algorithm 1).

    n sites need n (n + 1) / 2 - 1 losses if each round takes one, about n / `group` times
    `candidates` of them otherwise.

    Args:
        loss: of a model that bypasses these sites.
        group: sites that a round takes, the best ones if each were taken alone.
        candidates: that a round tries, the first of `sites` that are left; None is all.
    """
    order, left = list[Site](), list(sites)
    while left:
        tried = left[: candidates or len(left)]
        if len(tried) > group:
            losses = {site: loss([*order, site]) for site in tried}
            tried.sort(key=losses.__getitem__)
        order += tried[:group]
        left = [site for site in left if site not in order]
    return order


def expected_harm(probe: Probe, forecasters: Forecasters) -> dict[Site, float]:
    """Mean over tokens of log ||unit output - forecast||, plus log sensitivity of the unit.

    A first-order estimate, in logarithms, of what the LM loss gains by a bypass of all tokens; the
    score that `fit_recoverability` regresses for each token, averaged.
    """
    errors = SiteMeans()
    probe.sample(ROUTER_SHARE).stream(
        lambda view: errors.add(view.site, log_error(view, forecasters))
    )
    slopes = probe.sensitivity()
    return {s: mean + math.log(max(slopes[s], 1e-30)) for s, mean in errors.means().items()}


def split_by_loss(
    attention: Sequence[Site], mlps: Sequence[Site], loss: Callable[[list[Site]], float]
) -> list[list[Site]]:
    """Find the best n units of two orders, n = 0 .. all: the first so many of each.

    Harms are comparable within a kind only: attention bypassed in layer after layer costs a text
    its context, which no single bypass shows (`shift_kinds` does the same for routers). At the
    `ANCHORS` the number of MLPs walks down the loss; between them it is interpolated.

    Args:
        attention, mlps: best first.
        loss: of a model that bypasses these sites.
    """
    units, known = len(attention) + len(mlps), {0: 0}

    def taken(count: int, number: int) -> list[Site]:
        return [*attention[: count - number], *mlps[:number]]

    for count in sorted({round(share * units) for share in ANCHORS} - {0, units}):
        least, most = max(0, count - len(attention)), min(count, len(mlps))
        before = max(known)
        number = known[before] * count // before if before else count // 2
        number, losses = min(max(number, least), most), dict[int, float]()
        step = max(1, count // 6)
        while step:
            near = {min(max(n, least), most) for n in (number - step, number, number + step)}
            losses |= {n: loss(taken(count, n)) for n in sorted(near - losses.keys())}
            best = min(losses, key=losses.__getitem__)
            number, step = best, step if best != number else step // 2
        known[count] = number
    known[units] = len(mlps)
    numbers = [0]
    for (low, start), (high, end) in pairwise(sorted(known.items())):
        rise = (end - start) / (high - low)
        numbers += [round(start + rise * n) for n in range(1, high - low + 1)]
    return [taken(count, number) for count, number in enumerate(numbers)]


def best_cuts(probe: Probe) -> list[int]:
    """First layer of the best cut of n contiguous layers, n = 0 .. layers - 1.

    Best is the smallest mean over *all* calibration tokens of the angular distance
    arccos(cos(h_i, h_{i + n})) / pi between the stream that enters the cut and the one that leaves
    it (Gromov et al., arXiv 2403.17887, which looks at the last token of each text). A cut leaves
    the first layer: what is estimated there reads it.
    """
    layers = probe.shape.layers
    streams: list[Tensor] = []
    total = torch.zeros(layers + 1, layers + 1, dtype=torch.float64)

    def visit(view: UnitView) -> None:
        if view.site.kind == "attention":
            streams.append(functional.normalize(view.residual_ND.float(), dim=-1))
            return
        if view.site.layer < layers - 1:
            return
        streams.append(functional.normalize((view.residual_ND + view.y_ND).float(), dim=-1))
        for i, entering in enumerate(streams):
            for j, leaving in enumerate(streams[i + 1 :], i + 1):
                cosines = (entering * leaving.to(entering.device)).sum(-1).clamp(-1.0, 1.0)
                total[i, j] += cosines.arccos().sum(dtype=torch.float64).cpu()
        streams.clear()

    probe.stream(visit, split="calibration")
    found = [0]
    for n in range(1, layers):
        found.append(min(range(1, layers - n + 1), key=lambda i: float(total[i, i + n])))
    return found


def count_below(threshold: Tensor, most: int) -> int:
    """How many of the places 0 .. `most` - 1 lie below a threshold."""
    value = float(threshold)
    return sum(place < value for place in range(most))


class SiteMeans:
    """Streaming mean of a number of each token, per site; summed in float64 on the device."""

    def __init__(self) -> None:
        self.sums: dict[Site, Tensor] = {}
        self.counts: dict[Site, int] = {}

    def add(self, site: Site, values_N: Tensor) -> None:
        """Add N tokens."""
        total = values_N.sum(dtype=torch.float64)
        self.sums[site] = self.sums[site] + total if site in self.sums else total
        self.counts[site] = self.counts.get(site, 0) + len(values_N)

    def means(self) -> dict[Site, float]:
        """Read them from the device."""
        return {site: float(total) / self.counts[site] for site, total in self.sums.items()}


def cosines(before_ND: Tensor, after_ND: Tensor) -> Tensor:
    """Cosine of each token's two streams, float32 [N]."""
    return functional.cosine_similarity(before_ND.float(), after_ND.float(), dim=-1)
