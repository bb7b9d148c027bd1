"""A few of an MLP's own neurons, as the nonlinear part of its forecast."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from methods.base import Probe, Site, SwiGLU, UnitView


class Neurons(nn.Module):
    """down(silu(gate(x)) * up(x)) with few columns; float32, zero until they are chosen."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(width, count, bias=False) for _ in range(2))
        self.down = nn.Linear(count, width, bias=False)
        nn.init.zeros_(self.down.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        out: Tensor = self.down(functional.silu(self.gate(x)) * self.up(x))
        return out

    @torch.no_grad()
    def copy_from(self, mlp: SwiGLU, index: Tensor) -> None:
        """Take the neurons at `index`, int64 [count]."""
        self.gate.weight.copy_(mlp.gate_FD[index])
        self.up.weight.copy_(mlp.up_FD[index])
        self.down.weight.copy_(mlp.down_DF[:, index])


def keep_neurons(probe: Probe, kept: Mapping[Site, Neurons]) -> None:
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
        best = worth.topk(kept[site].gate.out_features).indices
        kept[site].copy_from(probe.swiglu(site), best.sort().values)
