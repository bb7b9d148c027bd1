"""Routers and forecasters that are plain maps, in the form that fused execution takes."""

from __future__ import annotations

from torch import Tensor, nn

from methods.parts.forecaster import Forecaster, Forecasters
from methods.parts.routers import Router, Routers
from methods.types import LinearUnit, Site


def linear_unit(routers: Routers, forecasters: Forecasters | None, site: Site) -> LinearUnit | None:
    """The site's router and forecaster; None if either is more than a linear score and two maps."""
    score = _score(routers.at(site))
    if score is None:
        return None
    if forecasters is None:
        return LinearUnit(*score)
    forecaster = forecasters.modules_by_site[site.key]
    assert isinstance(forecaster, Forecaster)
    if forecaster.neurons is not None:
        return None
    return LinearUnit(
        *score,
        down_rD=forecaster.down.weight,
        down_bias_r=forecaster.down.bias,
        up_Dr=forecaster.up.weight,
        bias_D=forecaster.up.bias,
        silu=isinstance(forecaster.activation, nn.SiLU),
    )


def _score(router: Router) -> tuple[Tensor, Tensor] | None:
    """(weight, offset) of a linear router; of two logits, their difference."""
    if router.inner is not None:
        return None
    weight, bias = router.head.weight.detach(), router.head.bias
    offset = weight.new_zeros(len(weight)) if bias is None else bias.detach()
    if len(weight) == 2:
        return weight[0] - weight[1], offset[0] - offset[1]
    return weight[0], offset[0]
