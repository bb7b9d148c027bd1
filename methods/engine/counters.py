"""Exact accounting of what a routed model executed; stays on the device, read once."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from methods.base import Shape, Site


@dataclass
class Counters:
    """Sums over valid tokens since the last reset, as int64 tensors on the model's device."""

    shape: Shape
    dropped: frozenset[Site] = frozenset()
    """Sites that every token bypasses and that are never asked."""
    tokens: Tensor | int = 0
    """Valid tokens that passed."""
    context: Tensor | int = 0
    """Sum over valid tokens of the keys that each attends to (its position + 1)."""
    executed: dict[Site, Tensor] = field(default_factory=dict)
    """Per routed site: tokens executed."""
    executed_context: dict[Site, Tensor] = field(default_factory=dict)
    """Per routed site: keys attended by executed tokens."""

    def start_forward(self, valid_BT: Tensor, positions_BT: Tensor) -> None:
        """Count the tokens of one forward call."""
        self.tokens = self.tokens + valid_BT.sum()
        self.context = self.context + ((positions_BT + 1) * valid_BT).sum()

    def add(self, site: Site, execute_BT: Tensor, positions_BT: Tensor) -> None:
        """Count one decision; `execute_BT` is already False for padding."""
        context = ((positions_BT + 1) * execute_BT).sum()
        self.executed[site] = self.executed.get(site, 0) + execute_BT.sum()
        self.executed_context[site] = self.executed_context.get(site, 0) + context

    def read(self) -> Usage:
        """Bring the sums to the host: one synchronisation for all of them."""
        sites = list(self.executed)
        flat = [torch.as_tensor(self.tokens), torch.as_tensor(self.context)]
        flat += [self.executed[s] for s in sites] + [self.executed_context[s] for s in sites]
        device = flat[-1].device
        values = torch.stack([v.to(device, torch.int64) for v in flat]).tolist()
        tokens, context, rest = values[0], values[1], values[2:]
        usage = Usage(shape=self.shape, tokens=tokens, context=context)
        usage.dropped = frozenset(unit for site in self.dropped for unit in site.units)
        usage.executed |= dict.fromkeys(usage.dropped, 0)
        usage.executed_context |= dict.fromkeys(usage.dropped, 0)
        for i, site in enumerate(sites):
            for unit in site.units:
                usage.executed[unit] = rest[i]
                usage.executed_context[unit] = rest[len(sites) + i]
            usage.decided[site] = rest[i]
        return usage


@dataclass
class Usage:
    """What was executed, per unit, as plain integers."""

    shape: Shape
    tokens: int
    context: int
    executed: dict[Site, int] = field(default_factory=dict)
    executed_context: dict[Site, int] = field(default_factory=dict)
    decided: dict[Site, int] = field(default_factory=dict)
    """Per routed site (blocks not split): tokens executed."""
    dropped: frozenset[Site] = frozenset()
    """Units that every token bypasses: without a decision, and without keys and values."""

    def rate(self, unit: Site) -> float:
        """Bypassed share of the tokens at one unit; 0 where the method does not route."""
        if not self.tokens:
            return 0.0
        return 1.0 - self.executed.get(unit, self.tokens) / self.tokens

    def sparsity(self, kind: str | None = None) -> float:
        """Bypassed share of (token, unit) pairs, over all units or those of one kind."""
        rates = [self.rate(u) for u in self.shape.units() if kind in (None, u.kind)]
        return sum(rates) / len(rates)

    def per_layer(self) -> list[dict[str, float]]:
        """Sparsity of the attention and MLP unit of each layer."""
        return [
            {
                "layer": layer,
                "attention": self.rate(Site(layer, "attention")),
                "mlp": self.rate(Site(layer, "mlp")),
            }
            for layer in range(self.shape.layers)
        ]
