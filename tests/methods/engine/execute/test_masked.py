"""Masked execution of every family against the same computation done token by token."""

from __future__ import annotations

import pytest
import torch

from methods.base import Site
from methods.dense import Dense
from methods.engine.routed import attach, routed
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
TOKENS = 12


def batch(side):
    """(ids, mask) of three rows that differ in length, or are all whole."""
    ids = small_ids(len(PADS), TOKENS)
    return (ids, torch.ones_like(ids)) if side == "none" else padded(ids, PADS, side)


@torch.no_grad()
def routed_logits(model, method, ids, mask, mode="masked"):
    with routed(model, method, mode):
        return model(input_ids=ids, attention_mask=mask).logits


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("granularity", ["unit", "block", "nowhere"])
def test_sparsity_zero_is_the_untouched_model(family_model, granularity, side):
    ids, mask = batch(side)
    untouched = family_model(input_ids=ids, attention_mask=mask).logits
    method = attach(family_model, Dense(sparsity=0.0))
    if granularity != "nowhere":
        sites = all_sites(family_model, granularity)
        method = Scripted(random_tables(sites, rows=len(PADS), execute=1.1))
    out = routed_logits(family_model, method, ids, mask)
    real = mask.bool()
    assert torch.allclose(out[real], untouched[real], atol=1e-5, rtol=0)
    if side == "none":
        assert torch.equal(out, untouched)


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("bypass", ["skip", "forecast"])
@pytest.mark.parametrize("granularity", ["unit", "block"])
@pytest.mark.parametrize("policy", ["keep", "evict"])
def test_half_bypassed_equals_brute_force(family_model, policy, granularity, bypass, side):
    ids, mask = batch(side)
    sites = all_sites(family_model, granularity)
    maps = random_maps(sites, 32) if bypass == "forecast" else None
    method = Scripted(random_tables(sites, rows=len(PADS)), maps, kv_policy=policy)
    out = routed_logits(family_model, method, ids, mask)
    for row, real in enumerate(mask.bool()):
        expected = brute_force(family_model, ids[row][real], method, row)
        assert torch.allclose(out[row][real], expected, atol=2e-4), row
    dense = family_model(input_ids=ids, attention_mask=mask).logits
    assert not torch.allclose(out[mask.bool()], dense[mask.bool()], atol=0.1)


def test_blocks_and_units_may_be_routed_together():
    model = small_model(layers=3)
    sites = [Site(0, "block"), Site(1, "attention"), Site(2, "mlp")]
    method = Scripted(random_tables(sites, rows=1), random_maps(sites, 32))
    ids = small_ids(1, TOKENS)
    out = routed_logits(model, method, ids, torch.ones_like(ids))
    assert torch.allclose(out[0], brute_force(model, ids[0], method, 0), atol=2e-4)


def training_logits(model, ids, gates):
    """Routed in training with these float gates; the tables say what gate > 0.5 says."""
    tables = {site: gate > 0.5 for site, gate in gates.items()}
    method = Scripted(tables, random_maps(list(gates), 32), gates)
    method.maps = {site: m.to(model.dtype) for site, m in method.maps.items()}
    with routed(model, method):
        routing_of(model).training = True
        return model(input_ids=ids).logits, method


@pytest.mark.parametrize("granularity", ["unit", "block"])
def test_hard_gates_of_training_equal_evaluation(granularity):
    model, ids = small_model(), small_ids(2, TOKENS)
    tables = random_tables(all_sites(model, granularity), rows=2)
    out, method = training_logits(model, ids, {s: t.float() for s, t in tables.items()})
    expected = routed_logits(model, method, ids, torch.ones_like(ids))
    assert torch.allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize("granularity", ["unit", "block"])
def test_gate_gradient_equals_finite_differences(granularity):
    model, ids = small_model().double(), small_ids(1, 6)
    generator = torch.Generator().manual_seed(2)
    gates = {
        site: torch.rand(1, 6, generator=generator, dtype=torch.float64).requires_grad_()
        for site in all_sites(model, granularity)
    }

    def loss():
        return training_logits(model, ids, gates)[0].log_softmax(-1)[0, :, 5].sum()

    loss().backward()
    step = 1e-3  # norms and rotations compute in float32
    for gate in gates.values():
        for place in (0, 3):
            with torch.no_grad():
                gate[0, place] += step
                above = loss()
                gate[0, place] -= 2 * step
                below = loss()
                gate[0, place] += step
            numeric = float(above - below) / (2 * step)
            assert float(gate.grad[0, place]) == pytest.approx(numeric, rel=1e-2, abs=1e-3)
            assert abs(numeric) > 1e-2
