"""What a router reads about a token: the unit's input, and what is known of its forecast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from methods.parts.forecaster import Forecasters
from methods.parts.recoverability import fit_recoverability
from methods.parts.routers import Routers
from methods.types import Probe, Site

Source = Literal["post_norm", "residual"]
Feature = Literal["forecast_norm", "code_norm", "predicted_error"]
SMALL = 1e-6
"""Keeps the logarithm finite where a forecast is zero."""


class RouterInput(nn.Module):
    """Input of the routers, [..., D] plus one number a feature, float32.

    Args:
        source: `post_norm`, the unit's normalised input (informed routing), or `residual`, the
            stream before the norm (SkipGPT).
        features: `forecast_norm`, log ||forecast||, for the price of a forecast for every token;
            `code_norm`, the same of the forecaster's bottleneck, for the price of its first map;
            `predicted_error`, a ridge estimate of log(||output - forecast|| / ||residual||).
        forecasters: whose forecasts the features are about.

    Raises:
        ValueError: an unknown choice, or features without forecasters.
    """

    def __init__(
        self, *, source: Source, features: Sequence[Feature], forecasters: Forecasters | None
    ) -> None:
        super().__init__()
        if source not in ("post_norm", "residual"):
            raise ValueError(f"router_input must be 'post_norm' or 'residual', not {source!r}")
        if unknown := sorted(set(features) - set(get_args(Feature))):
            known = ", ".join(get_args(Feature))
            raise ValueError(f"router_features must be among {known}, not {unknown}")
        if features and forecasters is None:
            raise ValueError("router_features are about forecasts: they need forecasters")
        self.source, self.features = source, tuple(features)
        self._about = (forecasters,)  # in a tuple: the forecasters are no part of this module
        self.errors = Routers(outputs=1) if "predicted_error" in features else None

    @property
    def plain(self) -> bool:
        """True if the router reads the unit's normalised input and nothing else."""
        return self.source == "post_norm" and not self.features

    def create(self, sites: Sequence[Site], width: int) -> int:
        """Make what the features need; returns the width of a router's input."""
        if self.errors is not None:
            self.errors.create(sites, width)
        self.flops_per_token = 2.0 * width if self.errors is not None else 0.0
        return width + len(self.features)

    def forward(self, site: Site, x: Tensor, residual: Tensor) -> Tensor:
        """The router's input for tokens [..., D]."""
        source = x if self.source == "post_norm" else residual
        if not self.features:
            return source
        columns = [source.float(), *(self._feature(f, site, x) for f in self.features)]
        return torch.cat(columns, dim=-1)

    def _feature(self, feature: Feature, site: Site, x: Tensor) -> Tensor:
        """One feature of tokens [..., D], float32 [..., 1]."""
        if feature == "predicted_error":
            assert self.errors is not None
            error: Tensor = self.errors(site, x)
            return error[..., None]
        forecasters = self._about[0]
        assert forecasters is not None
        norm_of = (
            forecasters(site, x) if feature == "forecast_norm" else forecasters.at(site).code(x)
        )
        return (norm_of.float().norm(dim=-1, keepdim=True) + SMALL).log()

    def fit(self, probe: Probe, *, damping: float) -> None:
        """Regress the forecasts' error, where a feature asks for it."""
        if self.errors is not None:
            fit_recoverability(
                probe, self.errors, self._about[0], damping=damping, sensitivity=False
            )

    def cost(self, site: Site) -> float:
        """Analytic FLOPs per token of the features."""
        forecasters, flops = self._about[0], self.flops_per_token
        if forecasters is None:
            return flops
        if "forecast_norm" in self.features:
            flops += forecasters.flops_per_token(site)
        if "code_norm" in self.features:
            flops += forecasters.at(site).code_flops_per_token
        return flops
