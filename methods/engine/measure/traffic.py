"""Bytes that decoding must read: the bound of its speed, since each weight serves few tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from methods.base import Method, Site
from methods.engine.decoder.families import layers_of
from methods.engine.measure.counters import Usage

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def dense_bytes(model: PreTrainedModel, usage: Usage) -> float:
    """Bytes that the untouched model reads in the forwards that `usage` counted.

    Every weight once a forward (norms and the LM head included, of the embeddings only the rows
    that are looked up), and the keys and values of every token in sight.
    """
    shape = usage.shape
    weights = sum(weight_bytes(part.layer) for part in layers_of(model)) + _ends(model)
    context = sum(usage.context_of(layer) for layer in range(shape.layers))
    keys = context * _key_bytes(model, usage)
    return usage.forwards * weights + keys + usage.tokens * _embedding_row(model)


def routed_bytes(model: PreTrainedModel, method: Method, usage: Usage) -> float:
    """The same for what was executed, routers and forecasters included.

    A unit's weights are read in a forward in which any token executes it; under KV policy `keep`
    its key and value projections always are. A forecaster is read where any token is bypassed.
    Routers and forecasters are linear maps in float32, whose FLOPs per token are two a weight.
    """
    total = float(usage.forwards * _ends(model) + usage.tokens * _embedding_row(model))
    parts = layers_of(model)
    # an estimate reads the input that the norm of its unit, a block's first, gives
    unread = usage.dropped - {site.units[0] for site in usage.estimated}
    for unit in usage.shape.units():
        part, active = parts[unit.layer], usage.active.get(unit, usage.forwards)
        module = part.attention if unit.kind == "attention" else part.mlp
        norm = part.attention_norm if unit.kind == "attention" else part.mlp_norm
        normed = 0 if unit in unread else usage.forwards
        finish = part.attention_after if unit.kind == "attention" else part.mlp_after
        finishing = 0 if finish is None else weight_bytes(finish)
        total += normed * weight_bytes(norm) + active * (weight_bytes(module) + finishing)
        if unit.kind == "attention":
            context = usage.executed_context.get(unit, usage.context_of(unit.layer))
            total += context * _key_bytes(model, usage)
            if method.kv_policy == "keep" and unit not in usage.dropped:
                idle = usage.forwards - active
                total += idle * _key_value_weights(module)
    for site in usage.decided:
        total += _added(method, site, usage)
    for site in usage.estimated:
        total += 4.0 * usage.forwards * method.cost(site).approximate / 2.0
    return total


def _key_value_weights(attention: nn.Module) -> int:
    """Bytes of what makes keys and values, the norm of keys included where a family has one."""
    names, children = ("k_proj", "v_proj", "k_norm"), dict(attention.named_children())
    found = sum(weight_bytes(part) for name, part in children.items() if name in names)
    if "qkv_proj" in children:
        config: Any = attention.config
        share = 2 * config.num_key_value_heads
        rows = weight_bytes(children["qkv_proj"])
        found += rows * share // (share + config.num_attention_heads)
    return found


def _added(method: Method, site: Site, usage: Usage) -> float:
    """Router and forecaster of one site, four bytes a weight."""
    cost, bypassing = method.cost(site), usage.bypassing.get(site, 0)
    return 4.0 * (usage.forwards * cost.route / 2.0 + bypassing * cost.approximate / 2.0)


def weight_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters."""
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _ends(model: PreTrainedModel) -> int:
    """Final norm and LM head."""
    head, norm = model.get_output_embeddings(), model.get_decoder().norm
    return weight_bytes(head) + weight_bytes(norm)  # type: ignore[arg-type]


def _embedding_row(model: PreTrainedModel) -> int:
    weight = model.get_input_embeddings().get_parameter("weight")
    return weight.shape[1] * weight.element_size()


def _key_bytes(model: PreTrainedModel, usage: Usage) -> int:
    """Key and value of one token in one layer."""
    size = next(model.parameters()).element_size()
    return 2 * usage.shape.kv_heads * usage.shape.head_dim * size
