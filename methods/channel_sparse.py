"""Channel sparsity: every token runs every MLP on its own largest channels. Compared by FLOPs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from methods.base import Method, Probe, RouteContext, Shape, Site, SiteCost
from methods.options import Sparsity


class ChannelSparse(Method):
    """Contextual sparsity of MLPs in the manner of TEAL (arXiv 2408.14690) and WINA (2505.19427).

    Each projection of a SwiGLU reads the largest k of its input's channels, chosen for each token,
    the first token of a text and every token of a prompt included; the others count as zero. No
    unit is bypassed, so there is no sparsity in the sense of this suite: figures stand against
    FLOPs alone. k is one share of the channels for all projections and layers (the published codes
    search a share for each), attention stays whole, and nothing is trained.

    Args:
        sparsity: share of the FLOPs of all units' weights that is saved, all of it in the MLPs.
        policy: by which channels are largest: `teal` |x_i|, `wina` |x_i| ||W_:,i||.
    """

    paper = "arXiv 2408.14690, arXiv 2505.19427"
    flops_only = True

    def __init__(self, *, sparsity: Sparsity, policy: Literal["teal", "wina"] = "wina") -> None:
        super().__init__(sparsity=sparsity)
        self.policy = policy

    def setup(self, shape: Shape) -> None:
        """Find the share of channels that saves the target.

        Raises:
            ValueError: the MLPs have less than that.
        """
        super().setup(shape)
        mlp = 3 * shape.width * shape.mlp_width
        attention = 2 * shape.width * shape.head_dim * (shape.heads + shape.kv_heads)
        self.share = 1.0 - self.sparsity * (mlp + attention) / mlp
        if self.share <= 0.0:
            most = mlp / (mlp + attention)
            raise ValueError(f"MLPs are {most:.3f} of the units' FLOPs: sparsity must be below")

    def sites(self) -> Sequence[Site]:
        assert self.shape is not None, "setup() comes first"
        return [Site(layer, "mlp") for layer in range(self.shape.layers)]

    def fixed(self) -> Mapping[Site, bool]:
        """No token is unlike another: a threshold of minus infinity is the dense model."""
        return dict.fromkeys(self.sites(), bool(self.threshold.isneginf()))

    def static(self) -> bool:
        """False: which channels a token runs is its own choice, in each unit."""
        return False

    def estimated(self) -> Collection[Site]:
        return [site for site, runs in self.fixed().items() if not runs]

    def estimate(self, site: Site, x_BTD: Tensor, ctx: RouteContext) -> Tensor:
        assert ctx.swiglu is not None
        gate_FD, up_FD, down_DF = ctx.swiglu()
        gate, up = self._product(x_BTD, gate_FD), self._product(x_BTD, up_FD)
        return self._product(functional.silu(gate) * up, down_DF)

    def calibrate(self, probe: Probe, sparsity: float) -> None:
        """Leave the dense model; what is saved is known from the sizes.

        Raises:
            UserError: an MLP is no SwiGLU.
        """
        for site in self.sites():
            probe.swiglu(site)
        self.threshold.fill_(0.0 if sparsity else float("-inf"))

    def achievable(self, sparsity: float) -> float:
        """Share of units that every token takes in part."""
        return self.reach() if sparsity else 0.0

    def cost(self, site: Site) -> SiteCost:
        assert self.shape is not None, "setup() comes first"
        width, neurons = self.shape.width, self.shape.mlp_width
        weights = 2 * self._count(width) * neurons + self._count(neurons) * width
        return SiteCost(approximate=2.0 * weights)

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        """Multiply the largest channels of x [.., I] by a weight [O, I]."""
        size = x.detach().float().abs()
        if self.policy == "wina":
            size = size * torch.linalg.vector_norm(weight, dim=0, dtype=torch.float32)
        index = size.topk(self._count(x.shape[-1]), dim=-1).indices
        kept = torch.zeros_like(x).scatter(-1, index, x.gather(-1, index))
        return functional.linear(kept, weight)

    def _count(self, channels: int) -> int:
        return max(1, round(self.share * channels))
