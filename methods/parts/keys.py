"""Keys and values of bypassed tokens, from the forecaster's bottleneck (KV policy `forecast`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from methods.parts.forecaster import Forecasters
from methods.parts.ridge import Moments
from methods.types import Probe, Shape, Site, Stage, UnitView


class KeyForecasts(nn.Module):
    """A linear map from r numbers of a token, the forecaster's bottleneck, to its K and V.

    A cache needs to hold those r numbers only. Fitted in closed form (ridge regression of K and V
    before rotation), and again once a gradient stage has moved the bottleneck.

    Args:
        forecasters: whose bottleneck is read.
        damping: ridge penalty relative to the mean variance of the bottleneck.
    """

    def __init__(self, forecasters: Forecasters, *, damping: float) -> None:
        super().__init__()
        self._read, self.damping = (forecasters,), damping
        self.modules_by_site = nn.ModuleDict()

    def create(self, sites: Sequence[Site], shape: Shape) -> None:
        """One map for each attention site."""
        self.outputs = 2 * shape.kv_heads * shape.head_dim
        for site in sites:
            if site.kind == "attention":
                self._put(site)

    def forward(self, site: Site, x: Tensor) -> Tensor:
        """[..., D] -> [..., 2 * key-value heads * head size], K then V, in the dtype of x."""
        code = self._read[0].at(site).code(x)
        both: Tensor = self.modules_by_site[site.key](code)
        return both.to(x.dtype)

    def stage(self, name: str, *, per_target: bool = False) -> Stage:
        """The stage that fits the maps."""
        return Stage(name, fit=self.fit, per_target=per_target)

    @torch.no_grad()
    def fit(self, probe: Probe) -> None:
        """One dense pass, then one float64 solve per site."""
        moments: dict[Site, Moments] = {}

        def visit(view: UnitView) -> None:
            if view.site.key not in self.modules_by_site:
                return
            assert view.keys is not None
            code, keys = self._read[0].at(view.site).code(view.x_ND), view.keys()
            if view.site not in moments:
                moments[view.site] = Moments(
                    inputs=code.shape[-1], outputs=keys.shape[-1], device=keys.device
                )
            moments[view.site].add(code, keys)

        probe.stream(visit)
        for site, sums in moments.items():
            weight, bias, _ = sums.ridge(self.damping)
            linear = self._put(site)
            linear.weight.copy_(weight.T)
            linear.bias.copy_(bias)

    def adopt(self) -> None:
        """Follow the ranks of the forecasters."""
        for key in list(self.modules_by_site):
            self._put(_site(key))

    def flops_per_token(self, site: Site) -> float:
        """Analytic FLOPs beside the forecast's own; 0 at an MLP."""
        return 2.0 * self._rank(site) * self.outputs if site.kind == "attention" else 0.0

    def stored(self, site: Site) -> float:
        """Numbers that a bypassed token keeps at this site."""
        return float(min(self._rank(site), self.outputs)) if site.kind == "attention" else 0.0

    def _rank(self, site: Site) -> int:
        return self._read[0].at(site).rank

    def _put(self, site: Site) -> nn.Linear:
        """The site's map, made anew (zero) if the forecaster's rank has changed."""
        rank, key = self._rank(site), site.key
        if key not in self.modules_by_site or self._linear(key).in_features != rank:
            linear = nn.Linear(rank, self.outputs)
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
            self.modules_by_site[key] = linear.to(self._read[0].at(site).down.weight.device)
        return self._linear(key)

    def _linear(self, key: str) -> nn.Linear:
        linear = self.modules_by_site[key]
        assert isinstance(linear, nn.Linear)
        return linear


def _site(key: str) -> Site:
    layer, _, _ = key.partition("_")
    return Site(int(layer), "attention")
