"""Exact accounting of what a routed model executed; stays on the device, read once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from methods.base import Shape, Site
from methods.engine.decoder.inputs import capturing


class Counters:
    """Sums over valid tokens since construction, on the model's device.

    Args:
        dropped: sites that every token bypasses and that are never asked.
        estimated: those of them that give every token an estimate.
        spread: layers are on several devices; what is noted is brought to that of the inputs.

    A decision costs a forward nothing but a list entry: the sums of all sites are formed together
    when the forward ends, and only `read` brings them to the host.
    """

    def __init__(
        self,
        shape: Shape,
        dropped: frozenset[Site] = frozenset(),
        estimated: frozenset[Site] = frozenset(),
        spread: bool = False,
        windows: Sequence[int | None] = (),
    ) -> None:
        self.shape, self.dropped, self.estimated = shape, dropped, estimated
        self.spread = spread
        self.windows = tuple(windows) or (None,) * shape.layers
        self.window = next((window for window in self.windows if window is not None), None)
        self._tokens: Tensor | None = None
        """int64 [5]: valid tokens, keys that each of them sees without a window and within it,
        tokens whose keys a cache with a window keeps, forwards."""
        self._sums: dict[tuple[Site, ...], Tensor] = {}
        """By the routed sites U of a forward, int64 [U, 4]: executed tokens, keys that they
        attended to, forwards in which any token executed, forwards in which any did not."""
        self._open: list[tuple[Site, Tensor, Tensor | None]] = []
        self._valid_BT: Tensor | None = None
        self._keys_BT: Tensor | None = None
        self._near_BT: Tensor | None = None

    def anew(self) -> Counters:
        """Counters of the same model that have counted nothing."""
        return Counters(self.shape, self.dropped, self.estimated, self.spread, self.windows)

    def copy(self) -> Counters:
        """As they are now; what is counted later does not change the copy."""
        made = copy.copy(self)
        made._sums, made._open = dict(self._sums), []
        return made

    def start_forward(self, valid_BT: Tensor, positions_BT: Tensor) -> None:
        """Open the count of one forward call."""
        self._open = []
        self._valid_BT, self._keys_BT = valid_BT, positions_BT + 1
        self._near_BT = (
            self._keys_BT if self.window is None else self._keys_BT.clamp_max(self.window)
        )

    def add(self, site: Site, execute_BT: Tensor, keys_BT: Tensor | None = None) -> None:
        """Note one decision.

        Args:
            execute_BT: bool, already False for padding.
            keys_BT: int64, keys that each token's query attends to; None means every token up to
                its own.
        """
        self._open.append((site, execute_BT, keys_BT))

    def end_forward(self) -> None:
        """Add what the forward noted; a few operations whatever the number of sites."""
        assert self._valid_BT is not None and self._near_BT is not None, "start_forward first"
        assert self._keys_BT is not None
        if capturing():
            # a replay would add the same tensors again and again: graphs are not counted
            self._open = []
            return
        valid = self._valid_BT
        self._tokens = _plus(self._tokens, self._all())
        if self.spread:
            self._open = [_moved(*noted, valid.device) for noted in self._open]
        if self._open:
            execute_UBT = torch.stack([execute for _, execute, _ in self._open])
            keys = [self._keys(site.layer) if k is None else k for site, _, k in self._open]
            plain = all(k is keys[0] for k in keys)
            sums_U4 = _sums(execute_UBT, keys[0] if plain else torch.stack(keys), valid)
            sites = tuple(site for site, _, _ in self._open)
            self._sums[sites] = _plus(self._sums.get(sites), sums_U4)
        self._open = []

    def _keys(self, layer: int) -> Tensor:
        """int64 [B, T]: keys that each token's query sees in a layer, if nobody is evicted."""
        keys_BT = self._keys_BT if self.windows[layer] is None else self._near_BT
        assert keys_BT is not None
        return keys_BT

    def _all(self) -> Tensor:
        """What the dense model executes of this forward, as `_tokens`."""
        valid, keys, near = self._valid_BT, self._keys_BT, self._near_BT
        assert valid is not None and keys is not None and near is not None
        kept = valid if self.window is None else valid & (keys < self.window)
        some = valid.any().long()
        sums = (valid.sum(), (valid * keys).sum(), (valid * near).sum(), kept.sum(), some)
        return torch.stack(sums)

    def read(self) -> Usage:
        """Bring the sums to the host: one synchronisation for all of them."""
        if self._tokens is None:
            return Usage(shape=self.shape, tokens=0, context=0)
        flat = torch.cat([self._tokens, *(s.flatten() for s in self._sums.values())]).tolist()
        tokens, context, near, kept, forwards = flat[:5]
        usage = Usage(shape=self.shape, tokens=tokens, context=context, forwards=forwards)
        usage.layers = [(tokens, context) if w is None else (kept, near) for w in self.windows]
        rows = [flat[start : start + 4] for start in range(5, len(flat), 4)]
        usage.dropped = frozenset(unit for site in self.dropped for unit in site.units)
        usage.estimated = self.estimated
        for sums in (usage.executed, usage.executed_context, usage.active):
            sums |= dict.fromkeys(usage.dropped, 0)
        order = [site for sites in self._sums for site in sites]
        for site, (executed, seen, active, bypassing) in zip(order, rows, strict=True):
            for unit in site.units:
                _count(usage.executed, unit, executed)
                _count(usage.executed_context, unit, seen)
                _count(usage.active, unit, active)
            _count(usage.decided, site, executed)
            _count(usage.bypassing, site, bypassing)
        return usage


def _sums(mask_UBT: Tensor, keys: Tensor, valid_BT: Tensor) -> Tensor:
    """int64 [U, 4]: tokens in the mask, their keys, whether any is in it, whether any is not."""
    tokens = mask_UBT.sum((1, 2))
    context = (mask_UBT * keys).sum((1, 2))
    return torch.stack([tokens, context, (tokens > 0).long(), (tokens < valid_BT.sum()).long()], 1)


def _moved(
    site: Site, execute_BT: Tensor, keys_BT: Tensor | None, device: torch.device
) -> tuple[Site, Tensor, Tensor | None]:
    return site, execute_BT.to(device), None if keys_BT is None else keys_BT.to(device)


def _count(sums: dict[Site, int], site: Site, more: int) -> None:
    sums[site] = sums.get(site, 0) + more


def _plus(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total + more.to(total.device)


@dataclass(repr=False)
class Usage:
    """What was executed, per unit, as plain integers."""

    shape: Shape
    tokens: int
    context: int
    """Sum over tokens of the keys that each sees where there is no sliding window."""
    forwards: int = 0
    layers: list[tuple[int, int]] = field(default_factory=list)
    """Of each layer, densely: tokens whose keys a cache keeps, and `context` within its window."""
    executed: dict[Site, int] = field(default_factory=dict)
    executed_context: dict[Site, int] = field(default_factory=dict)
    decided: dict[Site, int] = field(default_factory=dict)
    """Per routed site (blocks not split): tokens executed."""
    dropped: frozenset[Site] = frozenset()
    """Units that every token bypasses: without a decision, and without keys and values."""
    estimated: frozenset[Site] = frozenset()
    """Sites among those (blocks not split) that give every token an estimate."""
    active: dict[Site, int] = field(default_factory=dict)
    """Per unit: forwards in which any token executed it."""
    bypassing: dict[Site, int] = field(default_factory=dict)
    """Per routed site: forwards in which any token bypassed it."""

    def __repr__(self) -> str:
        parts = f"attention {self.sparsity('attention'):.3f}, mlp {self.sparsity('mlp'):.3f}"
        return f"sparsity {self.sparsity():.3f} ({parts}) over {self.tokens} tokens"

    def context_of(self, layer: int) -> int:
        """Sum over tokens of the keys that each sees in a layer of the dense model."""
        return self.layers[layer][1] if self.layers else self.context

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
