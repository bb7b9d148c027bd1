"""The start without a gradient of baselines: blocks as units, heads that are set, adapters."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
from torch import nn

from methods.base import Site, UnitView
from methods.parts.narrow_ffn import NarrowFFN, fit_linear
from methods.parts.ridge import at_sites
from methods.parts.router_start import fit_recoverability
from methods.parts.routers import BottleneckRouter, PerSite
from tests.methods.parts.text import SHAPE, MadeUp, linear_views

BLOCKS = (Site(0, "block"), Site(1, "block"))
UNITS = SHAPE.units()


def views(seed=1, noise=0.0):
    return linear_views(UNITS, tokens=60, batches=3, noise=noise, rank=2, seed=seed)


def test_a_block_is_its_input_and_what_both_halves_add():
    seen = []
    made = views()[:4]
    visit = at_sites(seen.append, {Site(0, "block"), Site(1, "mlp")})
    for view in made:
        visit(view)
    block, mlp = seen
    assert block.site == Site(0, "block") and mlp is made[3]
    assert torch.equal(block.x_ND, made[0].x_ND)
    assert torch.equal(block.residual_ND, made[0].residual_ND)
    assert torch.equal(block.y_ND, made[0].y_ND + made[1].y_ND)


def router(shape, two_maps):
    head = nn.Linear(5, 2)
    if two_maps:
        head = nn.Sequential(nn.Linear(5, 12, bias=False), nn.Linear(12, 1))
    return BottleneckRouter(
        width=shape.width, hidden=5, activation=nn.Tanh(), head=head, bias=False
    )


@pytest.mark.parametrize("two_maps", [False, True])
def test_a_head_that_is_set_gives_the_score(two_maps):
    torch.manual_seed(3)
    made, x, weight = router(SHAPE, two_maps), torch.randn(7, 12), torch.randn(5)
    made.set_head(weight, 0.7)
    assert torch.allclose(made(x), made.features(x) @ weight + 0.7, atol=1e-5)


@pytest.mark.parametrize("two_maps", [False, True])
def test_a_blocks_router_regresses_the_error_of_its_skip(two_maps):
    """By numpy, on the router's inner units; the slope is that of the block's last output."""
    torch.manual_seed(0)
    slopes = {site: 0.1 * (1 + i) for i, site in enumerate(UNITS)}
    probe, routers = MadeUp({"train": views()}, slopes), PerSite(lambda s: router(s, two_maps))
    routers.create(BLOCKS, SHAPE)
    fit_recoverability(probe, routers, None, damping=1e-9, scale=3.0)
    for block in BLOCKS:
        halves = [[v for v in probe.views["train"] if v.site == unit] for unit in block.units]
        x = torch.cat([view.x_ND for view in halves[0]])
        added = torch.cat([a.y_ND + m.y_ND for a, m in zip(*halves, strict=True)])
        target = numpy.log(numpy.linalg.norm(added.numpy(), axis=1)) + math.log(
            slopes[Site(block.layer, "mlp")]
        )
        tall = numpy.hstack([routers.at(block).features(x).detach().numpy(), numpy.ones((180, 1))])
        expected = 3.0 * tall @ numpy.linalg.lstsq(tall, target, rcond=None)[0]
        assert numpy.allclose(routers(block, x).detach().numpy(), expected, atol=1e-2)


@pytest.mark.parametrize(("kind", "most"), [("swiglu", 0.3), ("silu", 0.05)])
def test_an_adapter_starts_as_the_linear_map_of_its_unit(kind, most):
    """Exactly low rank here; what SiLU's bend leaves is small, and a held-out text agrees.

    Without biases the gates need a share of the input that all tokens have in common, which a
    normalised stream has; how far it is from constant bends the map, and most its mean.
    """
    torch.manual_seed(0)
    made, held = views(), views(seed=2)
    for view in [*made, *held]:
        if kind == "swiglu":
            view.x_ND = view.x_ND + 8.0 * torch.eye(12)[-1]
    probe = MadeUp({"train": made})
    adapters = PerSite(lambda s: NarrowFFN(width=s.width, hidden=14, kind=kind))
    adapters.create(UNITS, SHAPE)
    before = missed(adapters, held)
    fit_linear(probe, adapters, 1e-6)
    assert missed(adapters, held) < most < 0.9 < before


def missed(adapters, held: list[UnitView]) -> float:
    """Share of the outputs' variance that the adapters do not explain."""
    error = torch.stack([(v.y_ND - adapters(v.site, v.x_ND)).square().mean() for v in held])
    total = torch.stack([(v.y_ND - v.y_ND.mean(0)).square().mean() for v in held])
    return float((error.mean() / total.mean()).detach())
