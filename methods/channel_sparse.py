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
    share: Tensor
    """Of the channels, that each token runs."""

    def __init__(self, *, sparsity: Sparsity, policy: Literal["teal", "wina"] = "wina") -> None:
        super().__init__(sparsity=sparsity)
        self.policy = policy

    def setup(self, shape: Shape) -> None:
        """Take the sizes.

        Raises:
            ValueError: the MLPs have less FLOPs than are to be saved.
        """
        super().setup(shape)
        self.register_buffer("share", torch.zeros(()))
        mlp = 3 * shape.width * shape.mlp_width
        attention = 2 * shape.width * shape.head_dim * (shape.heads + shape.kv_heads)
        self.most = mlp / (mlp + attention)
        if self.sparsity >= self.most:
            raise ValueError(f"MLPs are {self.most:.3f} of the units' FLOPs: ask for less")

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
        """Leave the dense model; the share of channels follows from the sizes.

        Raises:
            UserError: an MLP is no SwiGLU.
        """
        for site in self.sites():
            probe.swiglu(site)
        self.share.fill_(self._kept(sparsity))
        self.threshold.fill_(0.0 if sparsity else float("-inf"))

    def achievable(self, sparsity: float) -> float:
        """Share of units that every token takes in part."""
        return self.reach() if sparsity else 0.0

    def cost(self, site: Site) -> SiteCost:
        assert self.shape is not None, "setup() comes first"
        width, neurons = self.shape.width, self.shape.mlp_width
        share = float(self.share) or self._kept(self.sparsity)  # 0: not calibrated yet
        count = {channels: max(1, round(share * channels)) for channels in (width, neurons)}
        return SiteCost(approximate=2.0 * (2 * count[width] * neurons + count[neurons] * width))

    def _kept(self, sparsity: float) -> float:
        """Share of channels at which the MLPs save this share of all units' FLOPs."""
        return max(1.0 - sparsity / self.most, 0.0)

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        """Multiply the largest channels of x [.., I] by a weight [O, I]."""
        size = x.detach().float().abs()
        if self.policy == "wina":
            size = size * torch.linalg.vector_norm(weight, dim=0, dtype=torch.float32)
        # how many is known on the device alone: a number here would wait for it at every unit
        last = (self.share * x.shape[-1]).round().long().clamp_min(1) - 1
        least = size.sort(dim=-1, descending=True).values.index_select(-1, last.view(1))
        return functional.linear(x.where(size >= least, 0.0), weight)
