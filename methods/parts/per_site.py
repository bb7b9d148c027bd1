"""One small module for each site."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from methods.types import Site


class PerSite(nn.Module):
    """Routers or adapters of one kind, in float32.

    Args:
        make: builds the module of a site from the model's width D.
    """

    def __init__(self, make: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.make = make
        self.modules_by_site = nn.ModuleDict()

    def create(self, sites: Sequence[Site], width: int) -> None:
        """One module for each site."""
        for site in sites:
            self.modules_by_site[site.key] = self.make(width)

    def forward(self, site: Site, x: Tensor) -> Tensor:
        """Apply the module of `site`."""
        return self.modules_by_site[site.key](x)

    def flops_per_token(self, site: Site) -> float:
        """Analytic FLOPs of the matrices of `site`; a multiply and an add count two."""
        module = self.modules_by_site[site.key]
        return 2.0 * sum(p.numel() for p in module.parameters() if p.dim() == 2)
