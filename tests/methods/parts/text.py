"""A probe of made-up units: what a training-free fit is shown, chosen by the test."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from methods.base import Shape, Site, UnitView

SHAPE = Shape(layers=2, width=12, heads=2, kv_heads=1, head_dim=6, mlp_width=20, vocab=30)


class MadeUp:
    """Streams fixed views; sensitivities are given."""

    shape = SHAPE

    def __init__(
        self, views: Mapping[str, Sequence[UnitView]], slopes: Mapping[Site, float] | None = None
    ) -> None:
        self.views, self.slopes = views, slopes

    def stream(self, visit: Callable[[UnitView], None], split: str = "train") -> None:
        for view in self.views[split]:
            visit(view)

    def sample(self, share: float = 0.25) -> MadeUp:
        """All of it: the references read every view."""
        return self

    def sensitivity(self) -> dict[Site, float]:
        assert self.slopes is not None, "sensitivity was not asked for"
        return dict(self.slopes)


def linear_views(
    sites: Sequence[Site], *, tokens: int, batches: int, noise: float, rank: int, seed: int
) -> list[UnitView]:
    """Outputs of a fixed rank-r affine map of the input, plus noise; one map per site.

    The map depends on the site alone, so that two seeds give two samples of the same units.
    """
    width = SHAPE.width
    generator = torch.Generator().manual_seed(seed)
    views = []
    for _ in range(batches):
        for site in sites:
            own = torch.Generator().manual_seed(100 * site.layer + (site.kind == "mlp"))
            down = torch.randn(width, rank, generator=own)
            up = torch.randn(rank, width, generator=own) / rank**0.5
            shift = torch.randn(width, generator=own)
            x = _normal(tokens, generator) * 0.5 + 0.3
            y = x @ down @ up + shift + noise * _normal(tokens, generator)
            views.append(UnitView(site, x, y, 3 * _normal(tokens, generator)))
    return views


def _normal(tokens: int, generator: torch.Generator) -> Tensor:
    return torch.randn(tokens, SHAPE.width, generator=generator)
