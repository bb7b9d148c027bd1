"""Decoding with a cache: the same text, cache contents and counts whichever path runs."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from methods.base import Site
from methods.engine.cache.evict import KeptKeys
from methods.engine.cache.growing import (
    PreallocatedLayer,
    allocated_bytes,
    cache_bytes,
    preallocated_cache,
)
from methods.engine.routed import routed
from methods.engine.routing import routing_of
from tests.methods.conftest import small_ids, small_model
from tests.methods.engine.execute.test_gathered import POLICIES, windowed
from tests.methods.engine.scripted import (
    Scripted,
    all_sites,
    padded,
    random_maps,
    random_tables,
)

SAMPLERS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "beam": {"do_sample": False, "num_beams": 3},
}


class ByPosition(Scripted):
    """Decisions by position alone: beams change places, so a row's number means nothing."""

    def _at(self, table, positions_BT):
        return table[0][positions_BT]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("rows", [1, 2])
def test_generate_equals_masked(rows, policy, sampler):
    model = small_model()
    sites = all_sites(model, "unit")
    method = ByPosition(random_tables(sites, rows=1), random_maps(sites, 32), kv_policy=policy)
    ids, mask = padded(small_ids(rows, 8), (0, 3)[:rows], "left")
    outputs, counts = [], []
    for mode in ("masked", "gathered"):
        torch.manual_seed(3)
        with routed(model, method, mode):
            outputs.append(
                model.generate(ids, attention_mask=mask, max_new_tokens=12, **SAMPLERS[sampler])
            )
            counts.append(routing_of(model).counters.read())
    assert torch.equal(*outputs)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", ["llama", "mistral"])
@torch.no_grad()
def test_thousands_of_tokens(family, policy):
    """Logits at the end of a long decode equal one masked pass over the whole text."""
    prompt, total = 1900, 2100
    model = windowed(family, 700)
    sites, ids = all_sites(model, "unit"), small_ids(2, total)
    tables = random_tables(sites, rows=2, positions=total)
    method = Scripted(tables, random_maps(sites, 32), kv_policy=policy)
    with routed(model, method):
        expected = model(input_ids=ids).logits[:, prompt - 1 :]
    with routed(model, method, "gathered"):
        out = model(input_ids=ids[:, :prompt], use_cache=True)
        parts, cache = [out.logits[:, -1:]], out.past_key_values
        for place in range(prompt, total):
            step = model(input_ids=ids[:, place : place + 1], past_key_values=cache)
            parts.append(step.logits)
    assert torch.allclose(torch.cat(parts, 1), expected, atol=1e-3)


@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_bypassed_units_do_not_run(policy):
    """A decoded token that bypasses everything calls no projection but, under keep, K and V."""
    model = small_model()
    sites = all_sites(model, "unit")
    tables = {site: torch.ones(1, 20, dtype=torch.bool) for site in sites}
    for table in tables.values():
        table[:, 10:] = False
    method = Scripted(tables, kv_policy=policy)
    called: list[str] = []
    for name, module in model.model.layers.named_modules():
        if name.endswith("_proj"):
            module.register_forward_hook(lambda *_, n=name: called.append(n.split(".")[-1]))
    with routed(model, method, "gathered"):
        cache = model(input_ids=small_ids(1, 10), use_cache=True).past_key_values
        called.clear()
        model(input_ids=small_ids(1, 1), past_key_values=cache)
    weights_used = {name for name in called if name not in ("k_proj", "v_proj")}
    assert not weights_used
    assert ("k_proj" in called) == (policy == "keep")


@torch.no_grad()
def test_evicted_cache_holds_executed_tokens_only():
    model, tokens = small_model(), 40
    sites = all_sites(model, "block")
    tables = random_tables(sites, rows=2, execute=0.3)
    ids, caches = small_ids(2, tokens), {}
    for policy in POLICIES:
        caches[policy] = DynamicCache(config=model.config)
        with routed(model, Scripted(tables, kv_policy=policy), "gathered"):
            model(input_ids=ids, past_key_values=caches[policy])
    for layer in caches["evict"].layers:
        assert isinstance(layer, KeptKeys)
        assert layer.get_seq_length() == tokens
    held = [layer.counts for layer in caches["evict"].layers]
    kept = [tables[Site(i, "block")][:, :tokens].sum(1).tolist() for i in range(len(held))]
    assert held == kept
    share = sum(map(sum, kept)) / (len(kept) * 2 * tokens)
    assert cache_bytes(caches["evict"]) == pytest.approx(share * cache_bytes(caches["keep"]))
    assert allocated_bytes(caches["evict"]) < allocated_bytes(caches["keep"])
    one_token = 2 * 2 * model.config.num_key_value_heads * model.model.layers[0].self_attn.head_dim
    assert cache_bytes(caches["keep"]) == 2 * tokens * one_token * 4


@pytest.mark.parametrize("change", ["batch_select_indices", "crop"])
@torch.no_grad()
def test_an_empty_evicted_cache_follows_its_batch(change):
    """A prefill that executed nothing holds no keys, yet knows its sequences and its length."""
    model, prompt = small_model(), 6
    tables = random_tables(all_sites(model, "block"), rows=1, execute=0.5)
    for table in tables.values():
        table[:, :prompt] = False
    method = ByPosition(tables, kv_policy="evict")
    first, second, logits = small_ids(2, prompt), small_ids(3, 4), []
    for mode in ("masked", "gathered"):
        cache = DynamicCache(config=model.config)
        with routed(model, method, mode):
            model(input_ids=first, past_key_values=cache)
            if change == "crop":
                cache.crop(-2)
            cache.batch_select_indices(torch.tensor([1, 0, 1]))
            logits.append(model(input_ids=second, past_key_values=cache).logits)
    torch.testing.assert_close(logits[1], logits[0])


@pytest.mark.parametrize("beams", [1, 3])
def test_preallocated_cache_generates_the_same(beams):
    model, ids = small_model(), small_ids(2, 8)
    options = {"max_new_tokens": 300, "num_beams": beams, "do_sample": False}
    cache = preallocated_cache(model)
    assert all(type(layer) is PreallocatedLayer for layer in cache.layers)
    roomy = model.generate(ids, past_key_values=cache, **options)
    assert torch.equal(roomy, model.generate(ids, **options))
    if beams == 1:
        assert cache.layers[0].buffers[0].shape[2] > cache.get_seq_length() > 256


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@torch.no_grad()
def test_chunks_in_a_preallocated_cache(kernels):
    model, ids = small_model(), small_ids(2, 300)
    sites = all_sites(model, "unit")
    method = Scripted(random_tables(sites, rows=2, positions=300), random_maps(sites, 32))
    with routed(model, method):
        expected = model(input_ids=ids).logits
    cache, parts = preallocated_cache(model), []
    with routed(model, method, "gathered", kernels=kernels):
        for chunk in ids.split((7, 250, 43), 1):
            parts.append(model(input_ids=chunk, past_key_values=cache).logits)
    assert torch.allclose(torch.cat(parts, 1), expected, atol=1e-3)
    assert cache.get_seq_length() == 300


@torch.no_grad()
def test_preallocated_cache_may_be_cropped():
    model, ids = small_model(), small_ids(2, 16)
    cache = preallocated_cache(model)
    model(input_ids=ids, past_key_values=cache)
    cache.crop(-6)
    other = small_ids(2, 6, seed=4)
    out = model(input_ids=other, past_key_values=cache).logits
    whole = model(input_ids=torch.cat([ids[:, :10], other], 1)).logits
    assert torch.allclose(out, whole[:, 10:], atol=1e-5)


@pytest.mark.parametrize("mode", ["masked", "gathered"])
@torch.no_grad()
def test_cropped_cache_continues_as_if_never_seen(mode):
    model, ids = small_model(), small_ids(2, 16)
    sites = all_sites(model, "unit")
    method = Scripted(random_tables(sites, rows=2), kv_policy="evict")
    with routed(model, method, mode):
        expected = model(input_ids=ids).logits[:, 12:]
        cache = DynamicCache(config=model.config)
        model(input_ids=small_ids(2, 16, seed=9), past_key_values=cache)
        cache.crop(-16)
        model(input_ids=ids[:, :14], past_key_values=cache)
        cache.crop(-2)
        out = model(input_ids=ids[:, 12:], past_key_values=cache).logits
    assert torch.allclose(out, expected, atol=1e-4)


@pytest.mark.parametrize("mode", ["masked", "gathered"])
@torch.no_grad()
def test_evict_refuses_a_cache_that_kept(mode):
    model, ids = small_model(), small_ids(1, 6)
    cache = model(input_ids=ids, use_cache=True).past_key_values
    method = Scripted(random_tables(all_sites(model, "unit"), rows=1), kv_policy="evict")
    with routed(model, method, mode), pytest.raises(ValueError, match="empty dynamic cache"):
        model(input_ids=ids, past_key_values=cache)
