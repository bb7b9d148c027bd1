"""Narrow networks in a unit's place: trained adapters, or a few of an MLP's own neurons."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from methods.parts.ridge import site_moments
from methods.parts.routers import PerSite
from methods.types import Probe, Site, UnitView

LINEAR = 6.0
"""Where SiLU is a line within 2 % of its slope, and about the identity."""


class NarrowFFN(nn.Module):
    """A narrow feed-forward network; float32 inside, output in the dtype of the input.

    Args:
        width: D of the model.
        hidden: inner width.
        kind: `swiglu` is up(silu(gate x) * (into x)) without biases, the shape of a Llama MLP
            (FlexiDepth); `silu` is Linear -> SiLU -> Linear (HeRo).

    Raises:
        ValueError: the inner width is less than 1.
    """

    def __init__(self, *, width: int, hidden: int, kind: Literal["swiglu", "silu"]) -> None:
        super().__init__()
        if hidden < 1:
            raise ValueError(f"an adapter needs a hidden width of at least 1, not {hidden}")
        bias = kind == "silu"
        self.gate = nn.Linear(width, hidden, bias=False) if kind == "swiglu" else None
        self.into = nn.Linear(width, hidden, bias=bias)
        self.up = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        wide = x.float()
        inner = self.into(wide)
        if self.gate is None:
            inner = functional.silu(inner)
        else:
            inner = functional.silu(self.gate(wide)) * inner
        output: Tensor = self.up(inner)
        return output.to(x.dtype)

    @torch.no_grad()
    def set_linear(
        self, down_Dr: Tensor, up_rD: Tensor, mean_D: Tensor, bias_D: Tensor, one_D: Tensor
    ) -> None:
        """Make it nearly (x - mean) @ down @ up + bias, where SiLU is nearly a line.

        `silu` runs its inner units around `LINEAR`. `swiglu` has no biases: its gates stay there
        by the map of x that is nearest to 1, and one inner unit makes the constant.

        Args:
            down_Dr: of r inner units at most, one less of `swiglu`; (x - mean) @ down deviates
                by about 1.
            one_D: x @ one is about 1.
        """
        rank = down_Dr.shape[1]
        sigmoid = 1.0 / (1.0 + math.exp(-LINEAR))
        value, slope = LINEAR * sigmoid, sigmoid * (1.0 + LINEAR * (1.0 - sigmoid))
        self.into.weight.zero_()
        self.up.weight.zero_()
        if self.gate is None:
            self.into.weight[:rank] = down_Dr.T
            self.into.bias.fill_(LINEAR)
            self.into.bias[:rank] -= mean_D @ down_Dr
            self.up.weight[:, :rank] = up_rD.T / slope
            self.up.bias.copy_(bias_D - value / slope * up_rD.sum(0))
            return
        self.gate.weight.copy_((LINEAR * one_D).expand_as(self.gate.weight))
        centred_Dr = down_Dr - torch.outer(one_D, mean_D @ down_Dr)
        self.into.weight[:rank] = centred_Dr.T / value
        self.into.weight[rank] = one_D / value
        self.up.weight[:, :rank] = up_rD.T
        self.up.weight[:, rank] = bias_D


def no_neurons(width: int, count: int) -> NarrowFFN:
    """Build a network of the shape of `count` neurons that adds nothing until they are chosen.

    Args:
        width: D of the model.
    """
    kept = NarrowFFN(width=width, hidden=count, kind="swiglu")
    nn.init.zeros_(kept.up.weight)
    return kept


@torch.no_grad()
def keep_neurons(probe: Probe, kept: Mapping[Site, NarrowFFN]) -> None:
    """Copy into each of `kept` the neurons that a linear map of the input is worst without.

    Those whose contribution to the output varies most: the standard deviation of the activation
    over a sample of the training text, times the norm of its column of the down projection. A
    constant contribution is left out, because the forecaster's bias can take its place.
    """
    if not kept:
        return
    norms = {site: probe.swiglu(site).down_DF.float().norm(dim=0) for site in kept}
    sums: dict[Site, Tensor] = {}
    count = dict.fromkeys(kept, 0)

    def visit(view: UnitView) -> None:
        if view.site not in kept:
            return
        assert view.neurons is not None
        active = view.neurons().double()
        new = torch.stack([active.sum(0), active.square().sum(0)])
        sums[view.site] = sums[view.site] + new if view.site in sums else new
        count[view.site] += len(active)

    probe.sample().stream(visit)
    for site, (total, squares) in sums.items():
        variance = squares / count[site] - (total / count[site]).square()
        worth = variance.clamp_min(0.0).sqrt() * norms[site]
        own, mlp = kept[site], probe.swiglu(site)
        best = worth.topk(own.into.out_features).indices.sort().values
        assert own.gate is not None
        own.gate.weight.copy_(mlp.gate_FD[best])
        own.into.weight.copy_(mlp.up_FD[best])
        own.up.weight.copy_(mlp.down_DF[:, best])


def fit_linear(probe: Probe, adapters: PerSite[NarrowFFN], damping: float) -> None:
    """Start each adapter as the closed-form forecaster of its own inner width.

    The reduced-rank ridge regression of what the unit (or the block) adds on its normalised input,
    which a trained adapter otherwise has to find from nothing.

    Args:
        damping: ridge penalty relative to the mean variance of the input.
    """
    moments = site_moments(probe, lambda view: (view.x_ND, view.y_ND), adapters)
    for site in list(moments):
        sums, adapter = moments.pop(site), adapters.at(site)
        hidden = adapter.into.out_features - (adapter.gate is not None)
        found = sums.components(damping)
        down_Dr, up_rD, _ = found.take(hidden)
        scatter = sums.xx / sums.count - torch.outer(found.mean_x, found.mean_x)
        size_r = (down_Dr * (scatter @ down_Dr)).sum(0).clamp_min(1e-12).sqrt()
        ridge = sums.xx / sums.count
        ridge.diagonal().add_(damping * ridge.diagonal().mean())
        one_D = torch.linalg.solve(ridge, found.mean_x)
        parts = (down_Dr / size_r, up_rD * size_r[:, None], found.mean_x, found.mean_y, one_D)
        adapter.set_linear(*(part.float() for part in parts))
