"""Reserved tokens, against tables in which they are executed."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from methods.base import Site
from methods.engine.execute import gathered
from methods.engine.measure.clock import Bench
from methods.engine.routed import routed
from methods.engine.routing import routing_of
from tests.methods.conftest import small_ids, small_model
from tests.methods.engine.execute.test_gathered import in_chunks
from tests.methods.engine.execute.test_one_token import Linear, decoded
from tests.methods.engine.scripted import (
    Scripted,
    all_sites,
    brute_force,
    padded,
    random_maps,
    random_tables,
)

ROWS, TOKENS = 3, 12


def both(model, granularity, reserve, policy="keep"):
    """A method that bypasses the first tokens but for the reserve, and one that says the same."""
    sites = all_sites(model, granularity)
    asked, done = (random_tables(sites, rows=ROWS) for _ in range(2))
    for site in sites:
        asked[site][:, :reserve], done[site][:, :reserve] = False, True
    maps = random_maps(sites, 32)
    method = Scripted(asked, maps, kv_policy=policy, reserve=reserve)
    return method, Scripted(done, maps, kv_policy=policy)


@torch.no_grad()
def run(model, method, ids, mask, mode, **options):
    with routed(model, method, mode):
        out = model(input_ids=ids, attention_mask=mask, **options).logits
        return out, routing_of(model).counters.read()


@pytest.mark.parametrize("mode", ["masked", "gathered", "fused"])
@pytest.mark.parametrize("policy", ["keep", "evict"])
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("granularity, reserve", [("unit", 1), ("unit", 3), ("block", 2)])
def test_equals_brute_force(granularity, reserve, side, policy, mode, monkeypatch):
    if mode == "fused":
        monkeypatch.setattr(gathered, "use_triton", lambda setting, tensor: True)
        mode = "gathered"
    model, ids = small_model(), small_ids(ROWS, TOKENS)
    ids, mask = (ids, None) if side == "none" else padded(ids, (0, 3, 5), side)
    method, same = both(model, granularity, reserve, policy)
    out, usage = run(model, method, ids, mask, mode)
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    for row, kept in enumerate(real):
        expected = brute_force(model, ids[row][kept], same, row)
        assert torch.allclose(out[row][kept], expected, atol=3e-4), row
    assert usage == run(model, same, ids, mask, mode)[1]


@pytest.mark.parametrize("mode", ["masked", "gathered"])
@pytest.mark.parametrize("policy", ["keep", "evict"])
@pytest.mark.parametrize("cuts", [(1, 2, 3), (1,), (2, 5), (5,)])
def test_chunks_know_the_positions_before_them(cuts, policy, mode):
    """Also one that begins before, within and after the reserve, beside left padding."""
    model = small_model()
    ids, mask = padded(small_ids(ROWS, TOKENS), (0, 1, 4), "left")
    method, same = both(model, "unit", 3, policy)
    expected, _ = run(model, same, ids, mask, "masked")
    found = in_chunks(model, method, ids, mask, list(cuts), mode)
    assert torch.allclose(found[mask.bool()], expected[mask.bool()], atol=2e-4)


@pytest.mark.parametrize("reserve", [1, 3])
@pytest.mark.parametrize("threshold", [0.0, 100.0])
@torch.no_grad()
def test_single_tokens_equal_one_pass(threshold, reserve):
    """From the first token on, by the path that decides with a number."""
    model, ids = small_model(), small_ids(1, 8)
    sites = all_sites(model, "unit")
    method = Linear(sites, threshold, forecast=True, silu=False, reserve=reserve)
    whole, usage = run(model, method, ids, None, "masked")
    with routed(model, method, "gathered"):
        cache, parts = DynamicCache(config=model.config), []
        for place in range(8):
            step = model(input_ids=ids[:, place : place + 1], past_key_values=cache)
            parts.append(step.logits)
        counted = routing_of(model).counters.read()
    assert torch.allclose(torch.cat(parts, 1), whole, atol=2e-4)
    assert counted.executed == usage.executed
    if threshold == 100.0:
        assert set(usage.decided.values()) == {reserve}


def test_padding_before_a_prompt_of_one_token():
    model, ids = small_model(), small_ids(1, 8)
    mask = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1]])  # one real token in the prompt of six
    method = Linear(all_sites(model, "unit"), 100.0, forecast=True, silu=False, reserve=2)
    expected, usage = decoded(model, method, ids, mask, "masked")
    out, counted = decoded(model, method, ids, mask, "gathered")
    assert torch.allclose(out[:, 5:], expected[:, 5:], atol=2e-4)
    assert counted == usage and set(usage.decided.values()) == {2}


@pytest.mark.parametrize("mode", ["masked", "gathered", "fused"])
def test_every_packed_sequence_has_its_own(mode, monkeypatch):
    if mode == "fused":
        monkeypatch.setattr(gathered, "use_triton", lambda setting, tensor: True)
        mode = "gathered"
    model, ids = small_model(), small_ids(1, TOKENS)
    packed = torch.tensor([[*range(5), *range(7)]])
    method, same = both(model, "unit", 2)
    out, usage = run(model, method, ids, None, mode, position_ids=packed, use_cache=False)
    expected = [brute_force(model, part, same, 0) for part in (ids[0, :5], ids[0, 5:])]
    assert torch.allclose(out[0], torch.cat(expected), atol=3e-4)
    assert usage.context == 15 + 28


def test_gates_of_reserved_tokens_are_one_in_training():
    model, ids = small_model(), small_ids(2, 6)
    sites = all_sites(model, "unit")
    gates = {site: torch.rand(2, 6, requires_grad=True) for site in sites}
    tables = {site: torch.zeros(2, 6, dtype=torch.bool) for site in sites}
    with routed(model, Scripted(tables, gates=gates, reserve=2)):
        routing = routing_of(model)
        routing.training = True
        model(input_ids=ids).logits.square().sum().backward()
        for site, decision in routing.decisions.items():
            assert (decision.gate_BT[:, :2] == 1).all()
            assert (gates[site].grad[:, :2] == 0).all() and (gates[site].grad[:, 2:] != 0).all()


def test_a_benchmarks_draw_reserves_nothing():
    model, ids = small_model(), small_ids(2, 6)
    method, _ = both(model, "unit", 2)
    for mode in ("masked", "gathered"):
        with torch.no_grad(), routed(model, method, mode):
            routing = routing_of(model)
            routing.bench = Bench(model.device, lambda site, valid_BT: torch.zeros_like(valid_BT))
            model(input_ids=ids)
            assert routing.counters.read().sparsity() == 1.0


@pytest.mark.parametrize("executes", [True, False])
def test_what_is_fixed_for_every_token_stays_so(executes):
    class Fixed(Scripted):
        def fixed(self):
            return {Site(0, "mlp"): executes}

    model, ids = small_model(), small_ids(2, 6)
    tables = {site: torch.zeros(2, 6, dtype=torch.bool) for site in all_sites(model, "unit")}
    _, usage = run(model, Fixed(tables, reserve=1), ids, None, "gathered")
    assert usage.executed.get(Site(0, "mlp"), usage.tokens) == 12 * executes
    assert usage.executed[Site(0, "attention")] == usage.executed[Site(1, "mlp")] == 2
