"""Small modules that score a token at one unit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from methods.types import Site

RouterKind = Literal["linear", "mlp"]


class Router(nn.Module):
    """Score whether to execute; kept in float32 whatever the model's dtype.

    `linear` is Linear(D, outputs); `mlp` is Linear(D, width) -> ReLU -> Linear(width, outputs).
    Two outputs are the logits (execute, bypass) of the papers; their difference is the score,
    which decides exactly as the softmax over the pair does.

    Args:
        width: D of the model.
        kind: `linear` or `mlp`.
        hidden: width of the hidden layer of `mlp`; 0 means D // 4.
        outputs: 1 (sigmoid) or 2 (softmax).
        bias: bias of the last layer.
    """

    def __init__(
        self,
        *,
        width: int,
        kind: RouterKind = "linear",
        hidden: int = 0,
        outputs: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if kind not in ("linear", "mlp"):
            raise ValueError(f"router must be 'linear' or 'mlp', not {kind!r}")
        inner = (hidden or width // 4) if kind == "mlp" else width
        if inner < 1:
            raise ValueError(f"an mlp router needs a hidden width of at least 1, not {inner}")
        self.inner: nn.Linear | None = None
        if kind == "mlp":
            self.inner = nn.Linear(width, inner)
            nn.init.kaiming_uniform_(self.inner.weight, nonlinearity="relu")
            nn.init.zeros_(self.inner.bias)
        self.head = nn.Linear(inner, outputs, bias=bias)
        self.flops_per_token = 2.0 * sum(p.numel() for p in self.parameters() if p.dim() == 2)

    def features(self, x: Tensor) -> Tensor:
        """Input of the last layer, float32: [..., D] -> [..., inner]."""
        x = x.float()
        return x if self.inner is None else torch.relu(self.inner(x))

    def forward(self, x: Tensor) -> Tensor:
        """Scores, float32: [..., D] -> [...]."""
        logits = self.head(self.features(x))
        return logits[..., 0] - logits[..., 1] if logits.shape[-1] == 2 else logits[..., 0]

    @torch.no_grad()
    def set_head(self, weight: Tensor, bias: float) -> None:
        """Make the score `features @ weight + bias` (weight: [inner])."""
        self.head.weight.zero_()
        self.head.weight[0] = weight
        if self.head.bias is not None:
            self.head.bias.zero_()
            self.head.bias[0] = bias

    @torch.no_grad()
    def shift(self, amount: float) -> None:
        """Add `amount` to every score.

        Raises:
            ValueError: the router has no bias.
        """
        if self.head.bias is None:
            raise ValueError("a router without a bias cannot shift its scores")
        self.head.bias[0] += amount


class Routers(nn.Module):
    """One router per site; the arguments are those of `Router`."""

    def __init__(
        self, *, kind: RouterKind = "linear", hidden: int = 0, outputs: int = 1, bias: bool = True
    ) -> None:
        super().__init__()
        self.kind, self.hidden, self.outputs, self.bias = kind, hidden, outputs, bias
        self.modules_by_site = nn.ModuleDict()

    def create(self, sites: Sequence[Site], width: int) -> None:
        """One router for each site; [.., width] -> [..]."""
        for site in sites:
            self.modules_by_site[site.key] = Router(
                width=width,
                kind=self.kind,
                hidden=self.hidden,
                outputs=self.outputs,
                bias=self.bias,
            )

    def __contains__(self, site: Site) -> bool:
        return site.key in self.modules_by_site

    def at(self, site: Site) -> Router:
        """The router of one site."""
        router = self.modules_by_site[site.key]
        assert isinstance(router, Router)
        return router

    def forward(self, site: Site, x: Tensor) -> Tensor:
        """Scores at `site`, float32."""
        return self.at(site)(x)
