"""A method that follows a table, and the same computation written without the engine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from methods.base import Decision, Method, RouteContext, Site, SiteCost
from methods.engine.decoder.families import shape_of

Tables = dict[Site, Tensor]
"""Per site: bool [sequences, positions]."""


class Scripted(Method):
    """Executes what its tables say for (sequence, position); padding must not shift positions.

    Args:
        tables: decision of each routed site.
        maps: a bypassed token gets x @ maps[site]; none means skip.
        gates: float gate of each routed site instead of the table's 0 and 1, for training.
        kv_policy: `keep` or `evict`.
        reserve: first tokens that execute whatever the tables say.
    """

    def __init__(
        self,
        tables: Tables,
        maps: Mapping[Site, Tensor] | None = None,
        gates: Mapping[Site, Tensor] | None = None,
        kv_policy: str = "keep",
        reserve: int = 0,
    ) -> None:
        super().__init__(sparsity=0.0)
        self.kv_policy, self.reserve = kv_policy, reserve
        self.tables, self.maps, self.gates = tables, maps, gates
        self.rows: list[int] | None = None
        """Sequences of the batch, if not all of the table in order."""

    def sites(self) -> Sequence[Site]:
        return list(self.tables)

    def route(self, site: Site, x_BTD: Tensor, ctx: RouteContext) -> Decision:
        execute = self._at(self.tables[site], ctx.positions_BT)
        gate = execute.to(x_BTD.dtype)
        if self.gates is not None:
            gate = self._at(self.gates[site], ctx.positions_BT)
        return Decision(execute, gate, gate.detach().float())

    def approximate(self, site: Site, x_BTD: Tensor) -> Tensor | None:
        return None if self.maps is None else x_BTD @ self.maps[site]

    def cost(self, site: Site) -> SiteCost:
        return SiteCost(route=7.0, approximate=1000.0)

    def _at(self, table: Tensor, positions_BT: Tensor) -> Tensor:
        rows = table if self.rows is None else table[self.rows]
        return rows.gather(1, positions_BT)


def all_sites(model: PreTrainedModel, granularity: str) -> list[Site]:
    """Every unit, or every block."""
    shape = shape_of(model.config)
    if granularity == "unit":
        return shape.units()
    return [Site(layer, "block") for layer in range(shape.layers)]


def random_tables(
    sites: Sequence[Site], *, rows: int, execute: float = 0.5, positions: int = 64, seed: int = 5
) -> Tables:
    """Each entry True with probability `execute`."""
    generator = torch.Generator().manual_seed(seed)
    return {s: torch.rand(rows, positions, generator=generator) < execute for s in sites}


def random_maps(sites: Sequence[Site], width: int, *, seed: int = 6) -> dict[Site, Tensor]:
    """A fixed linear estimate per site, [width, width]."""
    generator = torch.Generator().manual_seed(seed)
    return {s: torch.randn(width, width, generator=generator) * 0.3 for s in sites}


@torch.no_grad()
def brute_force(model: PreTrainedModel, ids_T: Tensor, method: Scripted, row: int) -> Tensor:
    """Logits [T, V] of one unpadded sequence, every skip written out token by token."""
    stack = model.model
    hidden = stack.embed_tokens(ids_T)
    for index, layer in enumerate(stack.layers):
        kept = _kept(method, index, row, len(ids_T))

        def attention(h: Tensor, layer: nn.Module = layer, kept: Tensor = kept) -> Tensor:
            x = layer.input_layernorm(h)
            return _attention(layer.self_attn, x, stack.rotary_emb.inv_freq, kept)

        def mlp(h: Tensor, layer: nn.Module = layer) -> Tensor:
            return layer.mlp(layer.post_attention_layernorm(h))

        def block(h: Tensor) -> Tensor:
            attended = h + attention(h)
            return attended + mlp(attended) - h

        first, second = layer.input_layernorm, layer.post_attention_layernorm
        if Site(index, "block") in method.tables:
            hidden = _step(method, Site(index, "block"), row, hidden, first(hidden), block)
            continue
        hidden = _step(method, Site(index, "attention"), row, hidden, first(hidden), attention)
        hidden = _step(method, Site(index, "mlp"), row, hidden, second(hidden), mlp)
    return model.lm_head(stack.norm(hidden))


def _step(method: Scripted, site: Site, row: int, hidden: Tensor, x: Tensor, delta) -> Tensor:
    computed, after = delta(hidden), hidden.clone()
    for place in range(len(hidden)):
        if site not in method.tables or method.tables[site][row, place]:
            after[place] += computed[place]
        elif method.maps is not None:
            after[place] += method.maps[site].T @ x[place]
    return after


def _kept(method: Scripted, layer: int, row: int, tokens: int) -> Tensor:
    """Which tokens leave keys in a layer, bool [tokens]."""
    for site in (Site(layer, "block"), Site(layer, "attention")):
        if site in method.tables and method.kv_policy == "evict":
            return method.tables[site][row, :tokens]
    return torch.ones(tokens, dtype=torch.bool)


def _attention(module: nn.Module, x_TD: Tensor, frequencies: Tensor, kept_T: Tensor) -> Tensor:
    """Causal grouped-query attention with rotary positions, one query at a time."""
    tokens, head_dim = len(x_TD), module.head_dim
    q, k, v = (getattr(module, f"{name}_proj")(x_TD).view(tokens, -1, head_dim) for name in "qkv")
    if hasattr(module, "q_norm"):
        q, k = module.q_norm(q), module.k_norm(k)
    angles = torch.arange(tokens)[:, None, None] * frequencies
    q, k = _rotate(q, angles), _rotate(k, angles)
    shared = q.shape[1] // k.shape[1]
    heads = torch.zeros_like(q)
    for t in range(tokens):
        for h in range(q.shape[1]):
            seen = kept_T[: t + 1]
            keys, values = k[: t + 1, h // shared][seen], v[: t + 1, h // shared][seen]
            weights = torch.softmax(keys @ q[t, h] / math.sqrt(head_dim), dim=0)
            heads[t, h] = weights @ values
    return module.o_proj(heads.flatten(1))


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def padded(ids_BT: Tensor, pad: Sequence[int], side: str) -> tuple[Tensor, Tensor]:
    """Each row with its own number of leading or trailing pads: (ids, attention mask), [B, T'].

    Rows are cut so that all have the same padded length.
    """
    rows, masks = [], []
    for row, count in zip(ids_BT, pad, strict=True):
        kept, zeros = row[: len(row) - count], row.new_zeros(count)
        parts = [(zeros, zeros), (kept, torch.ones_like(kept))]
        if side == "right":
            parts.reverse()
        rows.append(torch.cat([part[0] for part in parts]))
        masks.append(torch.cat([part[1] for part in parts]))
    return torch.stack(rows), torch.stack(masks)
