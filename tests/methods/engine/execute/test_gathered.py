"""Gathered execution against the token-by-token reference and against the masked path."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from methods.base import Site
from methods.engine.decoder.families import FAMILIES
from methods.engine.execute.attention import BLOCK_QUERIES
from methods.engine.routed import routed
from methods.engine.routing import routing_of
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
POLICIES = ("keep", "evict")


@torch.no_grad()
def logits(model, method, ids, mask, mode, kernels="auto"):
    with routed(model, method, mode, kernels=kernels):
        return model(input_ids=ids, attention_mask=mask).logits


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("granularity", ["unit", "block"])
@pytest.mark.parametrize("policy", POLICIES)
def test_equals_brute_force(family_model, policy, granularity, side):
    ids = small_ids(len(PADS), 12)
    ids, mask = (ids, torch.ones_like(ids)) if side == "none" else padded(ids, PADS, side)
    sites = all_sites(family_model, granularity)
    tables = random_tables(sites, rows=len(PADS))
    method = Scripted(tables, random_maps(sites, 32), kv_policy=policy)
    out = logits(family_model, method, ids, mask, "gathered")
    for row, real in enumerate(mask.bool()):
        expected = brute_force(family_model, ids[row][real], method, row)
        assert torch.allclose(out[row][real], expected, atol=2e-4), row


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    granularity=st.sampled_from(["unit", "block"]),
    policy=st.sampled_from(POLICIES),
    pads=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    side=st.sampled_from(["left", "right"]),
    tokens=st.integers(7, 20),
    execute=st.sampled_from([-1.0, 0.1, 0.5, 0.9, 2.0]),
    forecast=st.booleans(),
    cuts=st.lists(st.integers(1, 19), max_size=3, unique=True),
    window=st.sampled_from([None, 5]),
    seed=st.integers(0, 1000),
    kernels=st.sampled_from(["auto", "torch"]),
    biased=st.booleans(),
)
def test_equals_masked(
    family,
    granularity,
    policy,
    pads,
    side,
    tokens,
    execute,
    forecast,
    cuts,
    window,
    seed,
    kernels,
    biased,
):
    """In one pass and in chunks with a cache, padded and not, from nothing to all executed."""
    takes = biased and family in ("llama", "qwen3")
    model = windowed(
        family, window, **({"attention_bias": True, "mlp_bias": True} if takes else {})
    )
    ids, mask = padded(small_ids(len(pads), tokens, seed=seed), pads, side)
    sites = all_sites(model, granularity)
    tables = random_tables(sites, rows=len(pads), execute=execute, seed=seed)
    method = Scripted(tables, random_maps(sites, 32) if forecast else None, kv_policy=policy)
    expected = logits(model, method, ids, mask, "masked")
    whole = logits(model, method, ids, mask, "gathered", kernels)
    real = mask.bool()
    assert torch.allclose(whole[real], expected[real], atol=2e-4)
    if side == "left":
        cuts = [c for c in sorted(cuts) if c < tokens]
        for mode in ("masked", "gathered"):
            chunks = in_chunks(model, method, ids, mask, cuts, mode, kernels)
            assert torch.allclose(chunks[real], expected[real], atol=2e-4), mode


def windowed(family, window, **options):
    """A small model whose attention looks back `window` tokens, where the family can.

    In all layers of Mistral, Mixtral and Phi-3, in all but the first of Qwen.
    """
    if window is None or family in ("llama", "olmo2", "granite"):
        return small_model(family, **options)
    if family.startswith(("qwen", "smollm")):
        options |= {"use_sliding_window": True}
    if family in ("qwen2", "qwen3"):
        options |= {"max_window_layers": 1, **options}
    return small_model(family, sliding_window=window, **options)


@torch.no_grad()
def in_chunks(model, method, ids, mask, cuts, mode, kernels="auto"):
    parts, cache = [], None
    with routed(model, method, mode, kernels=kernels):
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


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_many_query_blocks(kernels, family, policy):
    """More queries than a block holds; Mistral's window hides the oldest keys."""
    tokens = 3 * BLOCK_QUERIES
    model = windowed(family, 50)
    ids, sites = small_ids(2, tokens), all_sites(model, "unit")
    tables = random_tables(sites, rows=2, positions=tokens, execute=0.7)
    method = Scripted(tables, kv_policy=policy)
    mask = torch.ones_like(ids)
    expected = logits(model, method, ids, mask, "masked")
    found = logits(model, method, ids, mask, "gathered", kernels)
    assert torch.allclose(found, expected, atol=5e-4)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("granularity", ["unit", "block"])
def test_only_executed_rows_are_computed(granularity, policy):
    model, ids = small_model(), small_ids(2, 12)
    sites = all_sites(model, granularity)
    method = Scripted(random_tables(sites, rows=2, execute=0.4), kv_policy=policy)
    seen: dict[str, int] = {}
    names = ("mlp.gate_proj", "mlp.down_proj", *(f"self_attn.{n}_proj" for n in "qkvo"))
    for name in names:
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
    assert seen["mlp.gate_proj"] == seen["mlp.down_proj"] == mlps
    keys = ids.numel() if policy == "keep" else queries
    assert seen["self_attn.k_proj"] == seen["self_attn.v_proj"] == keys
