"""Routers without a gradient: regress how badly a bypass would miss the unit's output."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from methods.parts.forecaster import Forecasters
from methods.parts.ridge import Moments
from methods.parts.routers import Routers
from methods.types import Probe, Site, UnitView

ROUTER_SHARE = 0.5
"""Share of the fitting text that a router reads: it has one output where a forecaster has D."""
EPSILON = 1e-6
"""Keeps the logarithm finite where a forecast is exact."""


def fit_recoverability(
    probe: Probe,
    routers: Routers,
    forecasters: Forecasters | None,
    *,
    damping: float = 1e-3,
    sensitivity: bool = True,
    inputs: Callable[[Site, Tensor, Tensor], Tensor] = lambda site, x, residual: x,
) -> None:
    """Set each router's last layer by ridge regression so that its score is the expected harm.

    The regression target of a token is log ||unit output - bypass||. With `sensitivity`, the log
    of the unit's root mean square loss gradient is added: a first-order estimate of the loss, so
    that one global threshold compares units. Without it, the error is taken relative to the norm
    of the residual stream.

    Args:
        forecasters: what bypassed tokens get; None means skip, an estimate of zero.
        damping: ridge penalty relative to the mean variance of the router's features.
        inputs: what the routers read, from (site, normalised input, residual stream).
    """
    moments: dict[Site, Moments] = {}

    def visit(view: UnitView) -> None:
        if view.site not in routers:
            return
        read = inputs(view.site, view.x_ND, view.residual_ND)
        features = routers.at(view.site).features(read)
        if view.site not in moments:
            width = features.shape[-1]
            moments[view.site] = Moments(inputs=width, outputs=1, device=features.device)
        target = log_error(view, forecasters)
        if not sensitivity:
            target = target - (view.residual_ND.float().norm(dim=-1) + EPSILON).log()
        moments[view.site].add(features, target[:, None])

    probe.sample(ROUTER_SHARE).stream(visit)
    slopes = probe.sensitivity() if sensitivity else {}
    for site, sums in moments.items():
        weight, bias, _ = sums.ridge(damping)
        shift = math.log(max(slopes[site], 1e-30)) if sensitivity else 0.0
        routers.at(site).set_head(weight[:, 0].float(), float(bias[0]) + shift)


def log_error(view: UnitView, forecasters: Forecasters | None) -> Tensor:
    """log ||y - estimate|| of each token, float32 [N]; the estimate of skip is zero."""
    error = view.y_ND.float()
    if forecasters is not None:
        error = error - forecasters(view.site, view.x_ND).float()
    return (error.norm(dim=-1) + EPSILON).log()
