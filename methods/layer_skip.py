"""Static depth: the same units are dropped for every token."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from methods.base import Budget, Probe, Shape, Site, Stage
from methods.options import Count, LoraSpec, Natural, Positive, Sparsity
from methods.parts.routed_method import RoutedMethod
from methods.parts.static_order import best_cuts, block_influence, greedy_loss, unit_influence

log = logging.getLogger(__name__)

Policy = Literal[
    "uniform",
    "early_exit",
    "block_influence",
    "greedy_ppl",
    "attention_first",
    "contiguous",
    "random",
]


class LayerSkip(RoutedMethod):
    """Drops whole layers (or whole sublayers) by a ranking made once, whatever the input.

    Each policy gives an order in which sites are dropped; a target drops the first so many that
    its sparsity is nearest. Dropped attention has no keys and values.

    Args:
        policy: `block_influence` drops the blocks that turn the residual stream least (ShortGPT,
            Men et al., arXiv 2403.03853); `greedy_ppl` drops the block whose loss hurts least,
            again and again, never the first or the last (SLEB, Song et al., arXiv 2402.09025);
            `attention_first` drops attention sublayers that turn the stream least, then MLPs
            (LLM-Drop, He et al., arXiv 2406.15786); `contiguous` drops the one block of layers
            that turns the stream least (Gromov et al., arXiv 2403.17887), which ReplaceMe and
            LinearPatch patch; `early_exit` drops the last blocks;
            `uniform` drops at an even stride; `random` draws the blocks.
        seed: of `random`.
        tokens: text that `greedy_ppl` scores each candidate on.
        lora: adapters that heal the shortened model (`LoraSpec` fields), or None.
        lora_lr: of that stage.
    """

    paper = "arXiv 2403.03853, 2402.09025, 2406.15786, 2403.17887"
    order: Tensor

    def __init__(
        self,
        *,
        sparsity: Sparsity,
        policy: Policy = "block_influence",
        seed: Natural = 0,
        tokens: Count = 2048,
        lora: LoraSpec | None = None,
        lora_lr: Positive = 2e-4,
    ) -> None:
        super().__init__(sparsity=sparsity, lora=lora, lora_lr=lora_lr)
        self.policy, self.seed, self.tokens = policy, seed, tokens

    def setup(self, shape: Shape) -> None:
        super().setup(shape)
        self.register_buffer("order", torch.arange(len(self.sites())))

    def sites(self) -> Sequence[Site]:
        assert self.shape is not None, "setup() comes first"
        if self.policy == "attention_first":
            return self.shape.units()
        return [Site(layer, "block") for layer in range(self.shape.layers)]

    def fixed(self) -> Mapping[Site, bool]:
        """Execute a site iff its place in the order lies above the threshold."""
        sites, threshold = self.sites(), float(self.threshold)
        return {sites[i]: place > threshold for place, i in enumerate(self.order.tolist())}

    def fit(self, probe: Probe) -> None:
        """Rank the sites, first to be dropped first."""
        sites = list(self.sites())
        if self.policy == "block_influence":
            order = sorted(sites, key=block_influence(probe).__getitem__)
        elif self.policy == "attention_first":
            influence = unit_influence(probe)
            order = sorted(sites, key=lambda site: (site.kind == "mlp", influence[site]))
        elif self.policy == "greedy_ppl":
            inner = sites[1:-1]
            found = greedy_loss(inner, lambda dropped: probe.loss(dropped, tokens=self.tokens))
            order = [*found, sites[-1], sites[0]]
        elif self.policy == "random":
            shuffle = torch.Generator().manual_seed(self.seed)
            order = [sites[i] for i in torch.randperm(len(sites), generator=shuffle).tolist()]
        else:
            order = sites[::-1]
        self.order.copy_(torch.tensor([sites.index(site) for site in order]))

    def stages(self, budget: Budget) -> Iterable[Stage]:
        yield from self.lora_stages(budget)

    def calibrate(self, probe: Probe, sparsity: float) -> None:
        """Drop the nearest possible number of sites; one step is 1 / (number of sites)."""
        dropped, nearest = self._count(sparsity), self.achievable(sparsity)
        if self.policy == "uniform":
            self.order.copy_(uniform_order(len(self.order), dropped))
        if self.policy == "contiguous":
            first = best_cuts(probe)[min(dropped, len(self.order) - 1)]
            self.order.copy_(torch.arange(len(self.order)).roll(-first))
        self.threshold.fill_(dropped - 0.5)
        if abs(nearest - sparsity) > 1e-6:
            log.warning(
                "layer_skip: target %.4g is not a whole number of %d sites; dropping %d gives %.4f",
                *(sparsity, len(self.order), dropped, nearest),
            )

    def achievable(self, sparsity: float) -> float:
        """Nearest sparsity that a whole number of sites gives."""
        return self._count(sparsity) / len(self.sites())

    def _count(self, sparsity: float) -> int:
        return round(sparsity * len(self.sites()))


def uniform_order(sites: int, dropped: int) -> Tensor:
    """int64 permutation that starts with `dropped` sites at an even stride."""
    first = [int((i + 0.5) * sites / dropped) for i in range(dropped)]
    return torch.tensor(first + [i for i in range(sites) if i not in first])
