"""Sliding windows, as a model's configuration asks for them: caches, masks, counts."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from methods.base import Site
from methods.engine.measure.flops import kv_bytes_ratio
from methods.engine.measure.graphs import static_cache
from methods.engine.routed import routed
from methods.engine.routing import routing_of
from tests.methods.conftest import small_ids
from tests.methods.engine.execute.test_gathered import in_chunks, windowed
from tests.methods.engine.scripted import Scripted, all_sites, padded, random_maps, random_tables
from tests.methods.engine.test_routed import generate

FAMILIES = ("mistral", "qwen2", "qwen3")
MODES = ("masked", "gathered")
CUTS = (3, 8, 9, 10, 14)


def scripted(model, *, rows=2, **options):
    sites = all_sites(model, "unit")
    return Scripted(random_tables(sites, rows=rows), random_maps(sites, 32), **options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("policy", ["keep", "evict"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_nothing_bypassed_is_the_dense_model_beyond_the_window(family, policy, mode):
    model, (ids, mask) = windowed(family, 5), padded(small_ids(2, 20), (0, 3), "left")
    sites = all_sites(model, "unit")
    method = Scripted(random_tables(sites, rows=2, execute=2.0), kv_policy=policy)
    dense = model(input_ids=ids, attention_mask=mask).logits
    found = in_chunks(model, method, ids, mask, CUTS, mode)
    assert torch.allclose(found[mask.bool()], dense[mask.bool()], atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("first", [0, 1, 2])
@torch.no_grad()
def test_layers_that_keep_beside_layers_that_evict(first, mode):
    """Masks are made from the first layers, which are not routed (d_llm) or the only ones."""
    model, ids = windowed("mistral", 5, layers=3), small_ids(2, 16)
    sites = [Site(first, "block")]
    method = Scripted(random_tables(sites, rows=2), kv_policy="evict")
    with routed(model, method):
        expected = model(input_ids=ids).logits
    chunks = in_chunks(model, method, ids, torch.ones_like(ids), CUTS, mode)
    assert torch.allclose(chunks, expected, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_static_cache_equals_the_dynamic_one(family, mode):
    model = windowed(family, 5)
    method, (ids, mask) = scripted(model), padded(small_ids(2, 9), (0, 4), "left")
    _, expected = generate(model, method, ids, mask)
    _, found = generate(model, method, ids, mask, mode, cache_implementation="static")
    assert torch.allclose(found, expected, atol=2e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layer", [0, 1, 2])
@torch.no_grad()
def test_a_dropped_layer_leaves_the_masks_of_the_others_alone(layer, mode):
    """Layers 0 and 1 see all keys, 2 and 3 a window."""

    class Dropping(Scripted):
        def fixed(self):
            return {Site(layer, "attention"): False}

    model = windowed("qwen2", 5, layers=4, max_window_layers=2)
    sites = all_sites(model, "unit")
    tables = random_tables(sites, rows=2)
    tables[Site(layer, "attention")] = torch.zeros_like(tables[Site(layer, "attention")])
    ids, mask = padded(small_ids(2, 16), (0, 4), "left")
    with routed(model, Scripted(tables)):
        expected = model(input_ids=ids, attention_mask=mask).logits
    chunks = in_chunks(model, Dropping(tables), ids, mask, CUTS, mode)
    assert torch.allclose(chunks[mask.bool()], expected[mask.bool()], atol=1e-4)


@torch.no_grad()
def test_an_evicted_cache_drops_what_the_window_hides():
    model, ids = windowed("mistral", 6), small_ids(2, 80)
    sites = all_sites(model, "unit")
    tables = random_tables(sites, rows=2, positions=80, execute=0.5)
    cache = DynamicCache(config=model.config)
    with routed(model, Scripted(tables, kv_policy="evict"), "gathered"):
        for token in ids.split(1, 1):
            model(input_ids=token, past_key_values=cache)
    assert all(sum(layer.counts) < 80 for layer in cache.layers)
    with pytest.raises(ValueError, match="dropped keys that this crop needs"):
        cache.crop(-70)


def count_by_hand(tables, window, *, policy):
    """Keys that executed queries see in each layer, token by token."""
    found = []
    for layer, own in enumerate(window):
        table, keys = tables[Site(layer, "attention")][:, :14], 0
        for row in table:
            for t in row.nonzero().flatten().tolist():
                start = 0 if own is None else max(0, t + 1 - own)
                keys += t + 1 - start if policy == "keep" else int(row[start : t + 1].sum())
        found.append(keys)
    return found


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("policy", ["keep", "evict"])
def test_counts_stop_at_the_window(policy, mode):
    model, ids = windowed("qwen3", 5), small_ids(2, 14)
    method = scripted(model, kv_policy=policy)
    with torch.no_grad(), routed(model, method, mode):
        cache = DynamicCache(config=model.config)
        for chunk in ids.split((4, 7, 1, 2), 1):
            model(input_ids=chunk, past_key_values=cache)
        usage = routing_of(model).counters.read()
    found = [usage.executed_context[Site(layer, "attention")] for layer in range(2)]
    assert found == count_by_hand(method.tables, (None, 5), policy=policy)
    whole, near = 2 * 14 * 15 // 2, 2 * (1 + 2 + 3 + 4 + 5 * 10)
    assert usage.layers == [(28, whole), (8, near)]
    nothing = {site: torch.ones_like(table) for site, table in method.tables.items()}
    with torch.no_grad(), routed(model, Scripted(nothing, kv_policy=policy), mode):
        model(input_ids=ids)
        dense = routing_of(model).counters.read()
    for layer in range(2):
        assert dense.executed_context[Site(layer, "attention")] == dense.context_of(layer)
    rates = [usage.rate(Site(layer, "attention")) for layer in range(2)]
    expected = 1.0 if policy == "keep" else 1 - (28 * rates[0] + 8 * rates[1]) / 36
    assert kv_bytes_ratio(method, usage) == pytest.approx(expected)


def test_a_graph_refuses_a_window_that_it_cannot_follow():
    with pytest.raises(ValueError, match=r"speed\.graphs=false"):
        static_cache(windowed("mistral", 5), batch=1, tokens=8)
    assert static_cache(windowed("mistral", 8), batch=1, tokens=8).get_max_length() == 8
