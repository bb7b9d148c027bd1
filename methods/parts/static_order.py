"""How much a block or a unit matters to every token alike: rankings for static depth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from methods.types import Probe, Site, UnitView


def block_influence(probe: Probe) -> dict[Site, float]:
    """1 - mean cosine of the residual stream that enters and that leaves each layer.

    The Block Influence of ShortGPT (Men et al., arXiv 2403.03853, equation 1).
    """
    means = MeanCosines()
    entering: Tensor | None = None

    def visit(view: UnitView) -> None:
        nonlocal entering
        if view.site.kind == "attention":
            entering = view.residual_ND
            return
        assert entering is not None, "a layer's attention comes before its MLP"
        means.add(Site(view.site.layer, "block"), entering, view.residual_ND + view.y_ND)

    probe.stream(visit, split="calibration")
    return means.influence()


def unit_influence(probe: Probe) -> dict[Site, float]:
    """1 - mean cosine of x and x + unit(x) over tokens (LLM-Drop, arXiv 2406.15786, section 3)."""
    means = MeanCosines()
    probe.stream(
        lambda view: means.add(view.site, view.residual_ND, view.residual_ND + view.y_ND),
        split="calibration",
    )
    return means.influence()


def greedy_loss(probe: Probe, sites: Sequence[Site], *, tokens: int) -> Iterator[Site]:
    """Sites in the order in which dropping one more hurts the LM loss least (SLEB, algorithm 1).

    n sites need n (n + 1) / 2 - 1 passes over `tokens` tokens of training text.
    """
    dropped: list[Site] = []
    left = list(sites)
    while left:
        best = left[0]
        if len(left) > 1:
            best = min(left, key=lambda site: probe.loss([*dropped, site], tokens=tokens))
        left.remove(best)
        dropped.append(best)
        yield best


class MeanCosines:
    """Streaming mean of the cosine of two streams, per site; float32, summed in float64."""

    def __init__(self) -> None:
        self.sums: dict[Site, Tensor] = {}
        self.counts: dict[Site, int] = {}

    def add(self, site: Site, before_ND: Tensor, after_ND: Tensor) -> None:
        """Add N tokens."""
        cosine = functional.cosine_similarity(before_ND.float(), after_ND.float(), dim=-1)
        total = cosine.sum(dtype=torch.float64)
        self.sums[site] = self.sums[site] + total if site in self.sums else total
        self.counts[site] = self.counts.get(site, 0) + len(cosine)

    def influence(self) -> dict[Site, float]:
        """1 - mean, read from the device."""
        return {site: 1.0 - float(total) / self.counts[site] for site, total in self.sums.items()}
