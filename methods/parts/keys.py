"""Keys and values of bypassed tokens, from the forecaster's bottleneck (KV policy `forecast`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from methods.parts.forecaster import Forecasters
from methods.parts.ridge import site_moments
from methods.parts.routers import PerSite
from methods.types import Probe, Shape, Site, Stage, UnitView


class KeyForecasts(PerSite[nn.Linear]):
    """A linear map from r numbers of a token, the forecaster's bottleneck, to its K and V.

    A cache needs to hold those r numbers only. Fitted in closed form (ridge regression of K and V
    before rotation), and again once a gradient stage has moved the bottleneck.

    Args:
        forecasters: whose bottleneck is read; they are no part of this module.
    """

    def __init__(self, forecasters: Forecasters) -> None:
        super().__init__()
        self._read = (forecasters,)

    def create(self, sites: Sequence[Site], shape: Shape) -> None:
        """Build one map for each attention site, zero until it is fitted."""
        self.outputs = 2 * shape.kv_heads * shape.head_dim
        self.sites = [site for site in sites if site.kind == "attention"]
        self.follow()

    def follow(self) -> None:
        """Make those maps anew whose forecaster has another rank than they read."""
        for site in self.sites:
            reads = self._read[0].at(site).down
            if site in self and self.at(site).in_features == reads.out_features:
                continue
            linear = nn.Linear(reads.out_features, self.outputs)
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
            self.modules_by_site[site.key] = linear.to(reads.weight.device)

    def forward(self, site: Site, x: Tensor) -> Tensor:
        """[..., D] -> [..., 2 * key-value heads * head size], K then V, in the dtype of x."""
        both: Tensor = self.at(site)(self._read[0].at(site).code(x))
        return both.to(x.dtype)

    def stage(self, name: str, *, per_target: bool = False) -> Stage:
        """The stage that fits the maps."""
        return Stage(name, fit=self.fit, per_target=per_target)

    @torch.no_grad()
    def fit(self, probe: Probe) -> None:
        """One dense pass, then one float64 solve per site."""
        forecasters = self._read[0]

        def pair(view: UnitView) -> tuple[Tensor, Tensor]:
            assert view.keys is not None
            return forecasters.at(view.site).code(view.x_ND), view.keys()

        for site, sums in site_moments(probe, pair, self).items():
            weight, bias, _ = sums.ridge(forecasters.damping)
            self.at(site).weight.copy_(weight.T)
            self.at(site).bias.copy_(bias)

    def stored(self, site: Site) -> float:
        """Count the numbers that a bypassed token keeps at this site."""
        return float(min(self.at(site).in_features, self.outputs)) if site in self else 0.0
