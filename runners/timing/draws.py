"""Random decisions in the router's place: speed at any sparsity, on any weights."""

from __future__ import annotations

import torch
from torch import Tensor

from methods.base import Site

DRAWS = 16
"""Different random decisions per site."""


class RandomDraw:
    """Bernoulli decisions at a sparsity, a few drawn per site and shape, then replayed in turn.

    Args:
        sparsity: over all units of the model; sites that cover only part of them bypass more.
        covered: share of all units that the method routes.

    Raises:
        ValueError: more than the method's sites can bypass.
    """

    def __init__(self, sparsity: float, covered: float, seed: int, device: torch.device) -> None:
        if sparsity > covered:
            raise ValueError(f"sparsity {sparsity} is out of reach: {covered:.3f} of units routed")
        self.share = sparsity / covered if covered else 0.0
        self.generator = torch.Generator(device=device).manual_seed(seed)
        self.turn: dict[Site, int] = {}
        self.drawn: dict[tuple[Site, tuple[int, ...]], list[Tensor]] = {}

    def __call__(self, site: Site, valid_BT: Tensor) -> Tensor:
        """Bool [B, T]."""
        turn = self.turn[site] = (self.turn.get(site, 0) + 1) % DRAWS
        key = (site, tuple(valid_BT.shape))
        if key not in self.drawn:
            # all at once, so that no later pass pays for drawing
            size = (DRAWS, *valid_BT.shape)
            draws = torch.rand(size, generator=self.generator, device=self.generator.device)
            self.drawn[key] = list((draws >= self.share).to(valid_BT.device).unbind())
        return self.drawn[key][turn]
