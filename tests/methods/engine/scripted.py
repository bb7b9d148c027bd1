"""A method that follows a table, and the same computation written without the engine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

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
    stack, config = model.model, model.config
    hidden = stack.embed_tokens(ids_T) * getattr(config, "embedding_multiplier", 1.0)
    for index, layer in enumerate(stack.layers):
        kept = _kept(method, index, row, len(ids_T))
        before, after = norms_of(layer, config.model_type)
        factor = getattr(layer, "residual_multiplier", 1.0)

        def attention(
            h: Tensor,
            layer: nn.Module = layer,
            kept: Tensor = kept,
            index: int = index,
            before: Any = before,
            after: Any = after,
            factor: float = factor,
        ) -> Tensor:
            frequencies = _frequencies(stack, index)
            given = _attention(layer.self_attn, before[0](h), frequencies, kept)
            return factor * after[0](given)

        def mlp(
            h: Tensor,
            layer: nn.Module = layer,
            before: Any = before,
            after: Any = after,
            factor: float = factor,
        ) -> Tensor:
            return factor * after[1](layer.mlp(before[1](h)[None])[0])

        def block(h: Tensor) -> Tensor:
            attended = h + attention(h)
            return attended + mlp(attended) - h

        first, second = before
        if Site(index, "block") in method.tables:
            hidden = _step(method, Site(index, "block"), row, hidden, first(hidden), block)
            continue
        hidden = _step(method, Site(index, "attention"), row, hidden, first(hidden), attention)
        hidden = _step(method, Site(index, "mlp"), row, hidden, second(hidden), mlp)
    logits = model.lm_head(stack.norm(hidden)) / getattr(config, "logits_scaling", 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def norms_of(layer: Any, family: str) -> tuple[Any, Any]:
    """Norms before attention and MLP, and after them, as each family's paper has them."""
    if family.startswith("gemma"):
        before = layer.input_layernorm, layer.pre_feedforward_layernorm
        return before, (layer.post_attention_layernorm, layer.post_feedforward_layernorm)
    nothing = (lambda h: h, lambda h: h)
    if family == "olmo2":
        return nothing, (layer.post_attention_layernorm, layer.post_feedforward_layernorm)
    return (layer.input_layernorm, layer.post_attention_layernorm), nothing


def _frequencies(stack: Any, index: int) -> Tensor:
    """Of a layer's rotary positions, [half of what is turned]; empty where nothing is."""
    if not getattr(stack.layers[index].self_attn, "use_rope", True):
        return torch.empty(0)
    rotary = stack.rotary_emb
    if hasattr(rotary, "inv_freq"):
        return rotary.inv_freq
    return getattr(rotary, f"{stack.config.layer_types[index]}_inv_freq")


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


def _attention(module: Any, x_TD: Tensor, frequencies: Tensor, kept_T: Tensor) -> Tensor:
    """Causal grouped-query attention with rotary positions, one query at a time."""
    tokens, head_dim, config = len(x_TD), module.head_dim, module.config
    if hasattr(module, "qkv_proj"):
        numbers = (config.num_attention_heads, *[config.num_key_value_heads] * 2)
        parts = module.qkv_proj(x_TD).split([n * head_dim for n in numbers], dim=-1)
    else:
        parts = [getattr(module, f"{name}_proj")(x_TD) for name in "qkv"]
    q, k, v = parts
    if config.model_type == "olmo2":
        q, k = module.q_norm(q), module.k_norm(k)
    q, k, v = (part.view(tokens, -1, head_dim) for part in (q, k, v))
    if hasattr(module, "q_norm") and config.model_type != "olmo2":
        q, k = module.q_norm(q), module.k_norm(k)
    angles = torch.arange(tokens)[:, None, None] * frequencies
    q, k = _rotate(q, angles), _rotate(k, angles)
    shared = q.shape[1] // k.shape[1]
    scale = {"granite": getattr(config, "attention_multiplier", None)}.get(config.model_type)
    if config.model_type.startswith("gemma"):
        scale = config.query_pre_attn_scalar**-0.5
    cap = config.attn_logit_softcapping if config.model_type == "gemma2" else None
    heads = torch.zeros_like(q)
    for t in range(tokens):
        for h in range(q.shape[1]):
            seen = kept_T[: t + 1]
            keys, values = k[: t + 1, h // shared][seen], v[: t + 1, h // shared][seen]
            scores = keys @ q[t, h] * (scale or 1 / math.sqrt(head_dim))
            scores = scores if cap is None else cap * torch.tanh(scores / cap)
            heads[t, h] = torch.softmax(scores, dim=0) @ values
    return module.o_proj(heads.flatten(1))


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    """The first numbers of each head, twice as many as there are angles."""
    turned, rest = x[..., : 2 * angles.shape[-1]], x[..., 2 * angles.shape[-1] :]
    a, b = turned.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


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
