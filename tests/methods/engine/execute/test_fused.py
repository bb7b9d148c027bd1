"""The fused path, each kernel by its PyTorch reference, against the masked path."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from methods.engine.decoder.families import FAMILIES
from methods.engine.execute import gathered
from methods.engine.execute.fused import FusedExecutor
from methods.engine.measure.graphs import DecodeGraph, set_length, static_cache
from methods.engine.routed import attach, routed
from methods.engine.routing import routing_of
from methods.greedy import Greedy
from methods.informed import Informed
from tests.methods.conftest import small_ids, small_model
from tests.methods.engine.execute.test_gathered import in_chunks, logits, windowed
from tests.methods.engine.scripted import (
    Scripted,
    all_sites,
    padded,
    random_maps,
    random_tables,
)


@pytest.fixture
def fused(monkeypatch):
    """Send every unit that the fused path covers through it; returns the sites that went."""
    seen = []
    call = FusedExecutor.__call__

    def note(self, unit):
        seen.append(unit.site)
        return call(self, unit)

    monkeypatch.setattr(FusedExecutor, "__call__", note)
    monkeypatch.setattr(gathered, "use_triton", lambda setting, tensor: True)
    return seen


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    granularity=st.sampled_from(["unit", "block"]),
    pads=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    side=st.sampled_from(["left", "right"]),
    tokens=st.integers(7, 20),
    execute=st.sampled_from([-1.0, 0.5, 2.0]),
    forecast=st.booleans(),
    cuts=st.lists(st.integers(1, 19), max_size=3, unique=True),
    window=st.sampled_from([None, 5]),
    seed=st.integers(0, 1000),
)
def test_equals_masked(
    family, granularity, pads, side, tokens, execute, forecast, cuts, window, seed
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gathered, "use_triton", lambda setting, tensor: True)
        model = windowed(family, window)
        ids, mask = padded(small_ids(len(pads), tokens, seed=seed), pads, side)
        sites = all_sites(model, granularity)
        tables = random_tables(sites, rows=len(pads), execute=execute, seed=seed)
        method = Scripted(tables, random_maps(sites, 32) if forecast else None)
        expected = logits(model, method, ids, mask, "masked")
        real = mask.bool()
        whole = logits(model, method, ids, mask, "gathered")
        assert torch.allclose(whole[real], expected[real], atol=2e-4)
        if side == "left":
            cuts = [c for c in sorted(cuts) if c < tokens]
            chunks = in_chunks(model, method, ids, mask, cuts, "gathered")
            assert torch.allclose(chunks[real], expected[real], atol=2e-4)


@pytest.mark.parametrize("bypass", ["forecast", "skip"])
@pytest.mark.parametrize("cls", [Informed, Greedy])
def test_a_linear_method_is_routed_by_the_kernel_alone(cls, bypass, fused, monkeypatch):
    model, ids = small_model(), small_ids(2, 24)
    method = attach(model, cls(sparsity=0.5, bypass=bypass, rank=4)).eval()
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    method.threshold.fill_(0.1)
    with torch.no_grad(), routed(model, method) as masked:
        expected, usage = masked(input_ids=ids).logits, masked.routing.counters.read()
    assert 0.1 < usage.sparsity() < 0.9
    monkeypatch.setattr(cls, "route", None)
    monkeypatch.setattr(cls, "approximate", None)
    with torch.no_grad(), routed(model, method, "gathered") as sparse:
        out, counted = sparse(input_ids=ids).logits, sparse.routing.counters.read()
    assert torch.allclose(out, expected, atol=1e-4)
    assert counted == usage
    assert set(fused) == set(method.sites())


@torch.no_grad()
def test_a_static_cache_decodes_the_same(fused):
    """The cache of CUDA graphs, its length set back as a graph's is."""
    model, ids = small_model(), small_ids(2, 12)
    sites = all_sites(model, "unit")
    method = Scripted(random_tables(sites, rows=2), random_maps(sites, 32))
    expected = logits(model, method, ids, torch.ones_like(ids), "masked")
    with routed(model, method, "gathered"):
        cache = static_cache(model, batch=2, tokens=20)
        model(input_ids=ids[:, :8], past_key_values=cache)
        for _ in range(2):
            for layer in cache.layers:
                set_length(layer, 8)
            steps = [
                model(input_ids=ids[:, t : t + 1], past_key_values=cache).logits
                for t in range(8, 12)
            ]
    assert torch.allclose(torch.cat(steps, 1), expected[:, 8:], atol=2e-4)
    assert fused


def test_what_the_fused_path_does_not_cover_takes_the_general_one(fused):
    """Evicted keys, gaps in the mask and gradients; the numbers stay those of the masked path."""
    model, ids = small_model(), small_ids(1, 12)
    sites = all_sites(model, "unit")
    gap = torch.ones_like(ids)
    gap[:, 4:7] = 0
    for policy, mask in (("evict", torch.ones_like(ids)), ("keep", gap)):
        fused.clear()
        method = Scripted(random_tables(sites, rows=1), kv_policy=policy)
        expected = logits(model, method, ids, mask, "masked")
        out = logits(model, method, ids, mask, "gathered")
        assert torch.allclose(out[mask.bool()], expected[mask.bool()], atol=2e-4)
        assert all(site.kind == "mlp" for site in fused) and (policy == "evict" or not fused)
    fused.clear()
    with routed(model, Scripted(random_tables(sites, rows=1)), "gathered"):
        model(input_ids=ids)
        assert routing_of(model).counters.read().sparsity() > 0
    assert not fused


def test_kernels_setting_is_checked_where_no_kernel_can_run():
    model, ids = small_model(), small_ids(1, 4)
    method = Scripted(random_tables(all_sites(model, "unit"), rows=1))
    wrong = pytest.raises(ValueError, match="kernels=triton needs")
    with torch.no_grad(), routed(model, method, "gathered", kernels="triton"), wrong:
        model(input_ids=ids)
    with pytest.raises(ValueError, match="CUDA"):
        DecodeGraph(model, static_cache(model, batch=1, tokens=8), batch=1)
