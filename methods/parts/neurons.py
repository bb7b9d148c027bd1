"""A few of an MLP's own neurons, as the nonlinear part of its forecast."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from methods.parts.adapters import Adapter
from methods.types import Probe, Site, SwiGLU, UnitView


def no_neurons(width: int, count: int) -> Adapter:
    """Room for `count` neurons: an adapter of their shape that adds nothing until they are chosen.

    Args:
        width: D of the model.
    """
    room = Adapter(width=width, hidden=count, kind="swiglu")
    nn.init.zeros_(room.up.weight)
    return room


@torch.no_grad()
def copy_neurons(room: Adapter, mlp: SwiGLU, index: Tensor) -> None:
    """Fill the adapter with the neurons at `index`, int64 [count]."""
    assert room.gate is not None
    room.gate.weight.copy_(mlp.gate_FD[index])
    room.into.weight.copy_(mlp.up_FD[index])
    room.up.weight.copy_(mlp.down_DF[:, index])


def keep_neurons(probe: Probe, kept: Mapping[Site, Adapter]) -> None:
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
        best = worth.topk(kept[site].into.out_features).indices
        copy_neurons(kept[site], probe.swiglu(site), best.sort().values)
