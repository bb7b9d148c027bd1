"""Analytic FLOPs of a routed forward over the dense one; a multiply and an add count two."""

from __future__ import annotations

from collections.abc import Sequence

from methods.base import Method, Shape
from methods.engine.measure.counters import Usage


def dense_flops(
    shape: Shape, *, tokens: int, context: int | Sequence[int], head_tokens: int | None = None
) -> float:
    """Forward FLOPs of the untouched model, LM head included, norms and rotations left out.

    Args:
        tokens: valid tokens.
        context: sum over tokens of the keys each attends to, in every layer or of each.
        head_tokens: tokens whose logits are computed; None means all.
    """
    per_layer = tokens * (shape.query_flops() + shape.key_value_flops() + shape.mlp_flops())
    keys = shape.layers * context if isinstance(context, int) else sum(context)
    head = _head(shape, tokens if head_tokens is None else head_tokens)
    return shape.layers * per_layer + keys * shape.score_flops() + head


def routed_flops(method: Method, usage: Usage, *, head_tokens: int | None = None) -> float:
    """The same for what `usage` says was executed, routers and forecasters included.

    Under KV policy `keep` keys and values are computed for every token, but where attention is
    bypassed by all.
    """
    shape, total = usage.shape, 0.0
    for unit in shape.units():
        done = usage.executed.get(unit, usage.tokens)
        if unit.kind == "mlp":
            total += done * shape.mlp_flops()
            continue
        keeps = method.kv_policy == "keep" and unit not in usage.dropped
        kv_tokens = usage.tokens if keeps else done
        total += done * shape.query_flops() + kv_tokens * shape.key_value_flops()
        seen = usage.executed_context.get(unit, usage.context_of(unit.layer))
        total += seen * shape.score_flops()
    for site, done in usage.decided.items():
        cost = method.cost(site)
        total += usage.tokens * cost.route + (usage.tokens - done) * cost.approximate
    total += usage.tokens * sum(method.cost(site).approximate for site in usage.estimated)
    return total + _head(shape, usage.tokens if head_tokens is None else head_tokens)


def flops_ratio(method: Method, usage: Usage, *, head_tokens: int | None = None) -> float:
    """Routed over dense FLOPs on the tokens that `usage` counted."""
    context = [usage.context_of(layer) for layer in range(usage.shape.layers)]
    dense = dense_flops(usage.shape, tokens=usage.tokens, context=context, head_tokens=head_tokens)
    return routed_flops(method, usage, head_tokens=head_tokens) / dense


def _head(shape: Shape, tokens: int) -> float:
    return tokens * 2.0 * shape.width * shape.vocab


def kv_bytes_ratio(method: Method, usage: Usage) -> float:
    """Keys and values that the routed model keeps over those that the dense one keeps.

    Under KV policy `keep` those of every layer whose attention is not dropped; under `evict` the
    executed share of (token, attention unit) pairs; under `forecast` that share, and for the rest
    the numbers from which their K and V are forecast. A layer weighs as many tokens as its window
    lets a cache keep; which of a text's tokens those are does not count.
    """
    units = [u for u in usage.shape.units() if u.kind == "attention"]
    kept = [usage.layers[u.layer][0] if usage.layers else 1 for u in units]
    weight = {u: count / max(max(kept), 1) for u, count in zip(units, kept, strict=True)}
    whole = sum(weight.values()) or 1.0
    if method.kv_policy == "keep":
        return 1.0 - sum(weight.get(u, 0.0) for u in usage.dropped) / whole
    own = 1.0 - sum(weight[u] * usage.rate(u) for u in units) / whole
    if method.kv_policy == "evict":
        return own
    numbers = 2.0 * usage.shape.kv_heads * usage.shape.head_dim
    codes = [
        weight[u] * method.cost(u).stored * usage.rate(u) for u in usage.decided if u in weight
    ]
    return own + sum(codes) / (numbers * whole)
