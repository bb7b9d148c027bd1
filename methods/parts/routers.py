"""Small modules that score a token at one unit, and the container of one module a site."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from methods.types import Shape, Site

RouterKind = Literal["linear", "mlp"]
M = TypeVar("M", bound=nn.Module)


class PerSite(nn.Module, Generic[M]):
    """One module for each site: routers, forecasters or adapters, in float32.

    Args:
        make: builds the module of a site from the model's shape; None leaves all without.
    """

    def __init__(self, make: Callable[[Shape], M] | None = None) -> None:
        super().__init__()
        self.make = make
        self.modules_by_site = nn.ModuleDict()

    def create(self, sites: Sequence[Site], shape: Shape) -> None:
        """Build the modules of these sites, in their order."""
        for site in sites:
            if self.make is not None:
                self.modules_by_site[site.key] = self.make(shape)

    def __contains__(self, site: object) -> bool:
        return isinstance(site, Site) and site.key in self.modules_by_site

    def at(self, site: Site) -> M:
        """Return the module of one site."""
        return cast(M, self.modules_by_site[site.key])

    def forward(self, site: Site, x: Tensor) -> Tensor:
        """Apply the module of `site`."""
        return self.modules_by_site[site.key](x)

    def flops_per_token(self, site: Site) -> float:
        """Count the FLOPs of the matrices of `site`, two for a multiply and an add; 0 if none."""
        if site not in self:
            return 0.0
        return 2.0 * sum(p.numel() for p in self.at(site).parameters() if p.dim() == 2)


class Router(nn.Module):
    """Score whether to execute; kept in float32 whatever the model's dtype.

    `linear` is Linear(D, outputs); `mlp` is Linear(D, hidden) -> ReLU -> Linear(hidden, outputs).
    Two outputs are the logits (execute, bypass) of the papers; their difference is the score,
    which decides exactly as the softmax over the pair does.

    Args:
        width: D, of what the router reads.
        kind: `linear` or `mlp`.
        hidden: width of the hidden layer of `mlp`; 0 means D // 4.
        outputs: 1 (sigmoid) or 2 (softmax).
        bias: of the last layer.

    Raises:
        ValueError: no hidden width is left at this D.
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
        inner = (hidden or width // 4) if kind == "mlp" else width
        if inner < 1:
            raise ValueError(f"an mlp router needs a hidden width of at least 1, not {inner}")
        self.inner: nn.Linear | None = None
        if kind == "mlp":
            self.inner = nn.Linear(width, inner)
            nn.init.kaiming_uniform_(self.inner.weight, nonlinearity="relu")
            nn.init.zeros_(self.inner.bias)
        self.head = nn.Linear(inner, outputs, bias=bias)
        self.read_by_head = inner
        """Width of `features`."""

    def features(self, x: Tensor) -> Tensor:
        """Compute the input of the last layer, float32: [..., D] -> [..., inner]."""
        x = x.float()
        return x if self.inner is None else torch.relu(self.inner(x))

    def forward(self, x: Tensor) -> Tensor:
        """Score tokens, float32: [..., D] -> [...]."""
        logits = self.head(self.features(x))
        return logits[..., 0] - logits[..., 1] if logits.shape[-1] == 2 else logits[..., 0]

    def linear(self) -> tuple[Tensor, Tensor] | None:
        """Give the score as (weight [D], offset); None of an mlp."""
        if self.inner is not None:
            return None
        weight, bias = self.head.weight.detach(), self.head.bias
        offset = weight.new_zeros(len(weight)) if bias is None else bias.detach()
        if len(weight) == 2:
            return weight[0] - weight[1], offset[0] - offset[1]
        return weight[0], offset[0]

    @torch.no_grad()
    def set_head(self, weight: Tensor, bias: float) -> None:
        """Make the score `features @ weight + bias` (weight: [inner])."""
        self.head.weight.zero_()
        self.head.weight[0] = weight
        self.head.bias.zero_()
        self.head.bias[0] = bias

    @torch.no_grad()
    def shift(self, amount: float) -> None:
        """Add `amount` to every score."""
        self.head.bias[0] += amount


class Routers(PerSite[Router]):
    """One `Router` for each site, with these options of its own."""

    def __init__(self, **options: Any) -> None:
        super().__init__(lambda shape: Router(width=shape.width, **options))


class BottleneckRouter(nn.Module):
    """Linear(D, r) -> RMSNorm -> activation -> head; float32 score, execute where high.

    Args:
        width: D of the model.
        hidden: r.
        activation: after the norm.
        head: from r to one score, or to the logits (bypass, execute), whose difference is it.
        bias: of the first layer.

    Raises:
        ValueError: r is less than 1.
    """

    def __init__(
        self, *, width: int, hidden: int, activation: nn.Module, head: nn.Module, bias: bool
    ) -> None:
        super().__init__()
        if hidden < 1:
            raise ValueError(f"a router needs a hidden width of at least 1, not {hidden}")
        self.down = nn.Linear(width, hidden, bias=bias)
        self.norm = nn.RMSNorm(hidden, eps=1e-5)
        self.activation, self.head, self.read_by_head = activation, head, hidden

    def features(self, x: Tensor) -> Tensor:
        """Compute the head's input, float32: [..., D] -> [..., r]."""
        features: Tensor = self.activation(self.norm(self.down(x.float())))
        return features

    def forward(self, x: Tensor) -> Tensor:
        """Score tokens, float32: [..., D] -> [...]."""
        logits = self.head(self.features(x))
        return logits[..., 1] - logits[..., 0] if logits.shape[-1] == 2 else logits[..., 0]

    @torch.no_grad()
    def set_head(self, weight: Tensor, bias: float) -> None:
        """Make the score `features @ weight + bias` (weight: [r]).

        Of a head of two maps, the first changes by the least that does it.
        """
        if isinstance(self.head, nn.Sequential):
            inner, last = cast(tuple[nn.Linear, nn.Linear], tuple(self.head))
            row = last.weight[0]
            missing = weight - row @ inner.weight
            inner.weight += torch.outer(row, missing) / row.square().sum()
            last.bias.fill_(bias)
            return
        head = cast(nn.Linear, self.head)
        head.weight.zero_()
        head.weight[1] = weight
        head.bias.zero_()
        head.bias[1] = bias
