"""Gathered execution against the token-by-token reference and against the masked path."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from methods.base import Site
from methods.engine.families import FAMILIES
from methods.engine.gathered_attention import BLOCK_QUERIES
from methods.engine.wrap import routed, routing_of
from tests.methods.conftest import small_ids, small_model
from tests.methods.engine.scripted import (
    Scripted,
    all_sites,
    brute_force,
    padded,
    random_maps,
    random_tables,
)

PADS = (0, 3, 5)


@torch.no_grad()
def logits(model, method, ids, mask, mode):
    with routed(model, method, mode):
        return model(input_ids=ids, attention_mask=mask).logits


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("granularity", ["unit", "block"])
def test_equals_brute_force(family_model, granularity, side):
    ids = small_ids(len(PADS), 12)
    ids, mask = (ids, torch.ones_like(ids)) if side == "none" else padded(ids, PADS, side)
    sites = all_sites(family_model, granularity)
    method = Scripted(random_tables(sites, rows=len(PADS)), random_maps(sites, 32))
    out = logits(family_model, method, ids, mask, "gathered")
    for row, real in enumerate(mask.bool()):
        expected = brute_force(family_model, ids[row][real], method, row)
        assert torch.allclose(out[row][real], expected, atol=2e-4), row


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    granularity=st.sampled_from(["unit", "block"]),
    pads=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    side=st.sampled_from(["left", "right"]),
    tokens=st.integers(7, 20),
    execute=st.sampled_from([-1.0, 0.1, 0.5, 0.9, 2.0]),
    forecast=st.booleans(),
    cuts=st.lists(st.integers(1, 19), max_size=3, unique=True),
    seed=st.integers(0, 1000),
)
def test_equals_masked(family, granularity, pads, side, tokens, execute, forecast, cuts, seed):
    """In one pass and in chunks with a cache, padded and not, from nothing to all executed."""
    model = small_model(family)
    ids, mask = padded(small_ids(len(pads), tokens, seed=seed), pads, side)
    sites = all_sites(model, granularity)
    tables = random_tables(sites, rows=len(pads), execute=execute, seed=seed)
    method = Scripted(tables, random_maps(sites, 32) if forecast else None)
    expected = logits(model, method, ids, mask, "masked")
    whole = logits(model, method, ids, mask, "gathered")
    real = mask.bool()
    assert torch.allclose(whole[real], expected[real], atol=2e-4)
    if side == "left":
        chunks = in_chunks(model, method, ids, mask, [c for c in sorted(cuts) if c < tokens])
        assert torch.allclose(chunks[real], expected[real], atol=2e-4)


@torch.no_grad()
def in_chunks(model, method, ids, mask, cuts):
    parts, cache = [], None
    with routed(model, method, "gathered"):
        for start, end in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
            out = model(
                input_ids=ids[:, start:end],
                attention_mask=mask[:, :end],
                position_ids=(mask.cumsum(1) - 1).clamp_min(0)[:, start:end],
                past_key_values=cache,
                use_cache=True,
            )
            cache = out.past_key_values
            parts.append(out.logits)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_many_query_blocks(family):
    """More queries than a block holds; Mistral's window hides the oldest keys."""
    model = small_model(family)
    if family == "mistral":
        model.config.sliding_window = 50
    tokens = 3 * BLOCK_QUERIES
    ids, sites = small_ids(2, tokens), all_sites(model, "unit")
    method = Scripted(random_tables(sites, rows=2, positions=tokens, execute=0.7))
    mask = torch.ones_like(ids)
    expected = logits(model, method, ids, mask, "masked")
    assert torch.allclose(logits(model, method, ids, mask, "gathered"), expected, atol=5e-4)


@pytest.mark.parametrize("granularity", ["unit", "block"])
def test_only_executed_rows_are_computed(granularity):
    model, ids = small_model(), small_ids(2, 12)
    sites = all_sites(model, granularity)
    method = Scripted(random_tables(sites, rows=2, execute=0.4))
    seen: dict[str, int] = {}
    for name in ("mlp", "self_attn.q_proj", "self_attn.o_proj", "self_attn.k_proj"):
        module = model.model.layers[0].get_submodule(name)
        module.register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, args[0][..., 0].numel())
        )
    with torch.no_grad(), routed(model, method, "gathered"):
        model(input_ids=ids)
        assert 0.2 < routing_of(model).counters.read().sparsity() < 0.8
    kinds = ("block", "block") if granularity == "block" else ("attention", "mlp")
    queries, mlps = (int(method.tables[Site(0, kind)][:, :12].sum()) for kind in kinds)
    assert seen["self_attn.q_proj"] == seen["self_attn.o_proj"] == queries
    assert seen["mlp"] == mlps
    assert seen["self_attn.k_proj"] == ids.numel()


def test_generate_equals_masked():
    model = small_model()
    sites = all_sites(model, "unit")
    method = Scripted(random_tables(sites, rows=2), random_maps(sites, 32))
    ids, mask = padded(small_ids(2, 8), (0, 3), "left")
    outputs = []
    for mode in ("masked", "gathered"):
        with routed(model, method, mode):
            outputs.append(
                model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
            )
    assert torch.equal(*outputs)
