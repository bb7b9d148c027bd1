"""Bytes of decoding against the weights that the forward really touches."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from methods.engine.measure.traffic import dense_bytes, routed_bytes
from methods.engine.ops.cpu.compiled import CompiledRowOps
from methods.engine.ops.row_ops import RowOps
from methods.engine.routed import routed
from methods.engine.routing import routing_of
from tests.methods.conftest import small_ids, small_model
from tests.methods.engine.scripted import Scripted, all_sites, random_tables


def touched_bytes(model, run):
    """Bytes of the parameters of every module with weights that runs, once a forward."""
    seen: list[int] = []

    def note(module, *_):
        seen.append(sum(p.numel() * p.element_size() for p in module.parameters(recurse=False)))

    hooks = [
        module.register_forward_hook(note)
        for module in model.modules()
        if not isinstance(module, nn.Embedding) and any(True for _ in module.parameters(False))
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return sum(seen)


@pytest.mark.parametrize("policy", ["keep", "evict"])
@pytest.mark.parametrize("rows", [1, 3])
@torch.no_grad()
def test_decode_bytes_equal_what_is_touched(rows, policy, monkeypatch):
    # one token's norm reads its weight without calling its module, where no hook sees it
    monkeypatch.setattr(RowOps, "norm", lambda _, norm, x: norm(x))
    monkeypatch.setattr(CompiledRowOps, "norm", RowOps.norm)
    model, context, steps = small_model("qwen3"), 6, 4
    tables = random_tables(all_sites(model, "unit"), rows=rows, execute=0.4)
    method = Scripted(tables, kv_policy=policy)
    method.cost = lambda site: Scripted.__mro__[1].cost(method, site)
    ids = small_ids(rows, context + steps)

    def decode(cache):
        for place in range(context, context + steps):
            model(input_ids=ids[:, place : place + 1], past_key_values=cache)

    with routed(model, method, "gathered"):
        cache = model(input_ids=ids[:, :context], use_cache=True).past_key_values
        routing_of(model).reset_counters()
        routed_weights = touched_bytes(model, lambda: decode(cache))
        usage = routing_of(model).counters.read()
    cache = model(input_ids=ids[:, :context], use_cache=True).past_key_values
    dense_weights = touched_bytes(model, lambda: decode(cache))

    attention = model.model.layers[0].self_attn
    one_key = 2 * model.config.num_key_value_heads * attention.head_dim * 4
    looked_up = rows * steps * model.config.hidden_size * 4
    places = range(context, context + steps)
    dense_keys = rows * model.config.num_hidden_layers * sum(t + 1 for t in places)
    keys = 0
    for site, table in method.tables.items():
        for row in range(rows if site.kind == "attention" else 0):
            for t in places:
                seen = t + 1 if policy == "keep" else int(table[row, : t + 1].sum())
                keys += seen if table[row, t] else 0
    assert dense_bytes(model, usage) == dense_weights + looked_up + dense_keys * one_key
    assert routed_bytes(model, method, usage) == routed_weights + looked_up + keys * one_key
