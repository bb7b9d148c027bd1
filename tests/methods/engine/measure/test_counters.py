"""Realised sparsity against a count by hand over tables, tokens and padding."""

from __future__ import annotations

import pytest
import torch

from methods.base import Shape, Site
from methods.engine.measure.counters import Counters
from methods.engine.routed import routed
from methods.engine.routing import routing_of
from tests.methods.conftest import small_ids, small_model
from tests.methods.engine.scripted import Scripted, all_sites, padded, random_tables

PADS = (0, 2, 5)
TOKENS = 10
LENGTHS = [TOKENS - pad for pad in PADS]


def used(model, method, batches):
    """Usage after these (ids, mask) forwards."""
    with torch.no_grad(), routed(model, method):
        for ids, mask in batches:
            model(input_ids=ids, attention_mask=mask)
        return routing_of(model).counters.read()


def by_hand(method, unit):
    """(executed tokens, keys that they attend to) of one unit, None if it is never routed."""
    owners = [site for site in method.tables if unit in site.units]
    if not owners:
        return None
    places = [
        place
        for row, length in enumerate(LENGTHS)
        for place in range(length)
        if method.tables[owners[0]][row, place]
    ]
    return len(places), sum(place + 1 for place in places)


CHOICES = {
    "units": lambda model: all_sites(model, "unit"),
    "blocks": lambda model: all_sites(model, "block"),
    "some": lambda model: [Site(0, "mlp"), Site(2, "block")],
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("choice", CHOICES)
def test_usage_equals_a_count_by_hand(choice, side):
    model = small_model(layers=3)
    method = Scripted(random_tables(CHOICES[choice](model), rows=3))
    usage = used(model, method, [padded(small_ids(3, TOKENS), PADS, side)])
    tokens = sum(LENGTHS)
    assert usage.tokens == tokens
    assert usage.context == sum(n * (n + 1) // 2 for n in LENGTHS)
    bypassed = {"attention": [], "mlp": []}
    layers = [{"layer": float(layer)} for layer in range(3)]
    for unit in usage.shape.units():
        counted = by_hand(method, unit)
        if counted is None:
            assert unit not in usage.executed
        else:
            assert (usage.executed[unit], usage.executed_context[unit]) == counted
        share = 0.0 if counted is None else 1 - counted[0] / tokens
        assert usage.rate(unit) == pytest.approx(share)
        bypassed[unit.kind].append(share)
        layers[unit.layer][unit.kind] = pytest.approx(share)
    for kind, shares in bypassed.items():
        assert usage.sparsity(kind) == pytest.approx(sum(shares) / 3)
    everything = bypassed["attention"] + bypassed["mlp"]
    assert usage.sparsity() == pytest.approx(sum(everything) / 6)
    assert usage.per_layer() == layers
    decided = {site: by_hand(method, site.units[0])[0] for site in method.tables}
    assert usage.decided == decided


def test_batches_add_up_and_reset_starts_anew():
    model = small_model()
    method = Scripted(random_tables(all_sites(model, "unit"), rows=3))
    first = (small_ids(3, 8), torch.ones(3, 8, dtype=torch.long))
    second = padded(small_ids(3, 6, seed=1), (0, 1, 3), "left")
    together = used(model, method, [first, second])
    apart = [used(model, method, [part]) for part in (first, second)]
    assert together.tokens == sum(part.tokens for part in apart) == 38
    for unit in together.shape.units():
        assert together.executed[unit] == sum(part.executed[unit] for part in apart)
    with torch.no_grad(), routed(model, method):
        model(*first)
        routing_of(model).reset_counters()
        model(*second)
        assert routing_of(model).counters.read().executed == apart[1].executed


def test_a_cache_counts_as_one_pass_does():
    model, ids = small_model(), small_ids(2, 9)
    method = Scripted(random_tables(all_sites(model, "unit"), rows=2))
    mask = torch.ones_like(ids)
    whole = used(model, method, [(ids, mask)])
    with torch.no_grad(), routed(model, method):
        cache = None
        for start, end in ((0, 4), (4, 8), (8, 9)):
            out = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
            cache = out.past_key_values
        parts = routing_of(model).counters.read()
    assert (whole.forwards, parts.forwards) == (1, 3)
    for site, table in method.tables.items():
        chunks = [table[:, start:end] for start, end in ((0, 4), (4, 8), (8, 9))]
        assert parts.active[site] == sum(bool(c.any()) for c in chunks)
        assert parts.bypassing[site] == sum(not bool(c.all()) for c in chunks)
    per_token = ("tokens", "context", "executed", "executed_context", "decided")
    for name in per_token:
        assert getattr(parts, name) == getattr(whole, name), name


def test_nothing_counted_is_no_sparsity():
    usage = Counters(Shape(2, 32, 4, 2, 8, 48, 61)).read()
    assert usage.tokens == 0 and usage.sparsity() == 0.0
