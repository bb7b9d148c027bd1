"""Routers without a gradient: what a bypass would miss, and how the kinds of unit share it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from methods.parts.calibration import realising_threshold
from methods.parts.ridge import site_moments
from methods.parts.routers import PerSite, Router
from methods.types import Probe, Site, Stage, UnitView

ROUTER_SHARE = 0.5
"""Share of the fitting text that a router reads: it has one output where a forecaster has D."""
EPSILON = 1e-6
"""Keeps the logarithm finite where a forecast is exact."""
SHIFT_STEP = 0.3
"""Of the scores, which are logarithms: a factor of 1.35 in expected harm."""
MOST_SHIFTS = 6
SHIFT_SHARE = 0.125
"""Of the calibration text: each shift that is tried needs several passes over it."""
TOLERANCE = 0.004
"""Accepted distance of the realised sparsity from the target, at each shift that is tried."""


def fit_recoverability(
    probe: Probe,
    routers: PerSite[Any],
    bypasses: PerSite[Any] | None,
    *,
    damping: float = 1e-3,
    sensitivity: bool = True,
    read: Callable[[UnitView], Tensor] = lambda view: view.x_ND,
    saves: Callable[[Site], float] | None = None,
    scale: float = 1.0,
) -> None:
    """Set each router's last layer by ridge regression so that its score is the expected harm.

    The regression target of a token is log ||unit output - bypass||. With `sensitivity`, the log
    of the unit's root mean square loss gradient is added: a first-order estimate of the loss, so
    that one global threshold compares units. Without it, the error is taken relative to the norm
    of the residual stream.

    With `saves`, one threshold spends FLOPs instead of units: the divergence from the dense model
    is quadratic in a small error, so that harm per FLOP is error^2 / saved, and its square root is
    what is compared.

    Args:
        routers: of units or of blocks; each has `features` and `set_head`.
        bypasses: what bypassed tokens get; None means skip, an estimate of zero.
        damping: ridge penalty relative to the mean variance of the router's features.
        read: what the routers read of a unit.
        saves: FLOPs that a bypass of a site saves.
        scale: of the scores; no decision depends on it, but noise that training adds does.
    """

    def pair(view: UnitView) -> tuple[Tensor, Tensor]:
        features = routers.at(view.site).features(read(view))
        target = log_error(view, bypasses)
        if not sensitivity:
            target = target - (view.residual_ND.float().norm(dim=-1) + EPSILON).log()
        return features, target[:, None]

    slopes = probe.sensitivity() if sensitivity else {}  # its backward passes before the sums
    moments = site_moments(probe.sample(ROUTER_SHARE), pair, routers)
    for site, sums in moments.items():
        weight, bias, _ = sums.ridge(damping)
        # what a block adds is what its MLP's output adds to, so that their gradient is the same
        shift = math.log(max(slopes[site.units[-1]], 1e-30)) if sensitivity else 0.0
        if saves is not None:
            shift -= math.log(max(saves(site), 1.0)) / 2
        routers.at(site).set_head(scale * weight[:, 0].float(), scale * (float(bias[0]) + shift))


def log_error(view: UnitView, bypasses: PerSite[Any] | None) -> Tensor:
    """log ||y - estimate|| of each token, float32 [N]; the estimate of skip is zero."""
    error = view.y_ND.float()
    if bypasses is not None:
        error = error - bypasses(view.site, view.x_ND).float()
    return (error.norm(dim=-1) + EPSILON).log()


def shift_stage(
    routers: PerSite[Router],
    threshold: Tensor,
    targets: Sequence[float],
    sparsity: float,
    **how: Any,
) -> Stage:
    """`shift_kinds` as a stage: at the middle one of `targets`, or at the point's own target."""
    target = sorted(targets)[len(targets) // 2] if targets else sparsity

    def fit(probe: Probe) -> None:
        shift_kinds(probe, routers, threshold, target, **how)

    return Stage("kind_shift", fit=fit, per_target=not targets)


def shift_kinds(
    probe: Probe,
    routers: PerSite[Router],
    threshold: Tensor,
    sparsity: float,
    *,
    per_flop: bool = False,
    scale: float = 1.0,
) -> None:
    """Move the MLP scores to where the routed model loses least at the target.

    A score is what one bypass costs by itself. Costs of the same kind add up to more than their
    sum along a token: a token that bypasses attention in every layer loses its context, which no
    single bypass shows. So the dense model's slopes favour bypassing one kind too much. This walks
    down the LM loss on calibration text in steps of `SHIFT_STEP`, at the exact sparsity, and ends
    where a parabola through the best place and its neighbours is lowest.

    Args:
        routers: their heads are changed in place.
        threshold: the method's; left near where the target is realised.
        per_flop: compare shifts at the FLOPs that the target saves before the first of them, not
            at equal sparsity.
        scale: of the scores.
    """
    part = probe.sample(SHIFT_SHARE)
    sites = [site for site in probe.shape.units() if site in routers]
    if not {"attention", "mlp"} <= {site.kind for site in sites}:
        return

    def move(amount: float) -> None:
        for site in sites:
            if site.kind == "mlp":
                routers.at(site).shift(amount)

    step = SHIFT_STEP * scale
    saved: float | None = None

    def loss(near: float | None = None) -> float:
        nonlocal saved
        how: dict[str, Any] = {"tolerance": TOLERANCE, "near": near, "saved": saved}
        found = realising_threshold(part, sparsity, **how)
        threshold.fill_(found.threshold)
        if per_flop:
            saved = found.saved if saved is None else saved
        return part.routed_loss()

    losses, place, direction = {0: loss()}, 0, -1
    for _ in range(MOST_SHIFTS):
        tried = place + direction
        move(direction * step)
        losses[tried] = loss(near=float(threshold) + direction * step / 2)
        if losses[tried] < losses[place]:
            place = tried
            continue
        move(-direction * step)
        if tried != -1 or 1 in losses:
            break
        direction = 1
    # seeds that differ little would end a whole step apart at one of the places tried
    move(step * lowest(*(losses.get(near, math.inf) for near in (place - 1, place, place + 1))))


def lowest(before: float, here: float, after: float) -> float:
    """Where a parabola through losses at -1, 0 and 1 is lowest; 0 if it is not known to bend."""
    bend = before + after - 2 * here
    return (before - after) / (2 * bend) if 0 < bend < math.inf else 0.0
