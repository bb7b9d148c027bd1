"""Static bypass beside routed, executed and dropped sites, against brute force token by token."""

from __future__ import annotations

import pytest
import torch

from methods.base import BrokenContract, LinearUnit, Method, Site
from methods.engine.cache.growing import preallocated_cache
from methods.engine.measure.flops import dense_flops, flops_ratio, kv_bytes_ratio
from methods.engine.measure.traffic import routed_bytes
from methods.engine.routed import routed
from methods.engine.routing import routing_of
from methods.parts.calibration import calibrate_threshold
from runners.corpus.rows import ProbeText
from runners.training.probe import ModelProbe
from tests.methods.conftest import small_ids, small_model
from tests.methods.engine.execute.test_one_token import Linear
from tests.methods.engine.scripted import Scripted, all_sites, brute_force, padded, random_tables

WIDTH, RANK, ROWS = 32, 5, 3
LAYERS = 4
NEVER = torch.zeros(WIDTH), torch.tensor(float("-inf"))
KINDS = ("static", "routed", "executed", "dropped")


class Mixed(Scripted):
    """Sites in turn: an estimate for all, tables, executed by all, nothing for all.

    Args:
        linear: offer the static sites' estimates as two maps too.
    """

    def __init__(self, sites, *, linear=False, kv_policy="keep", turn=0):
        tables = random_tables(sites, rows=ROWS)
        self.kind = {s: KINDS[(turn + i) % 4] for i, s in enumerate(sites)}
        for site, kind in self.kind.items():
            if kind != "routed":
                tables[site] = torch.full_like(tables[site], kind == "executed")
        generator = torch.Generator().manual_seed(4)
        self.down, self.up, maps = {}, {}, {}
        for site in sites:
            self.down[site] = torch.randn(RANK, WIDTH, generator=generator) * 0.3
            self.up[site] = torch.randn(WIDTH, RANK, generator=generator) * 0.3
            maps[site] = (self.up[site] @ self.down[site]).T
            if self.kind[site] == "dropped":
                maps[site] = torch.zeros_like(maps[site])
        super().__init__(tables, maps, kv_policy=kv_policy)
        self.plain = linear

    def fixed(self):
        return {s: kind == "executed" for s, kind in self.kind.items() if kind != "routed"}

    def estimated(self):
        return [site for site, kind in self.kind.items() if kind == "static"]

    def route(self, site, x_BTD, ctx):
        assert self.kind[site] == "routed"
        return super().route(site, x_BTD, ctx)

    def linear(self, site):
        if not self.plain or self.kind[site] != "static":
            return None
        return LinearUnit(*NEVER, self.down[site], None, self.up[site], None)


@torch.no_grad()
def logits_of(model, method, ids, mask, mode):
    with routed(model, method, mode):
        out = model(input_ids=ids, attention_mask=mask).logits
        return out, routing_of(model).counters.read()


@pytest.mark.parametrize("mode, linear", [("masked", 0), ("gathered", 0), ("gathered", 1)])
@pytest.mark.parametrize("policy", ["keep", "evict"])
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("granularity, turn", [("unit", 0), ("unit", 1), ("block", 0)])
def test_equals_brute_force(granularity, turn, side, policy, mode, linear):
    model, ids = small_model(layers=LAYERS), small_ids(ROWS, 12)
    mask = torch.ones_like(ids)
    if side != "none":
        ids, mask = padded(ids, (0, 3, 5), side)
    sites = all_sites(model, granularity)
    method = Mixed(sites, linear=bool(linear), kv_policy=policy, turn=turn)
    out, usage = logits_of(model, method, ids, mask, mode)
    for row, real in enumerate(mask.bool()):
        expected = brute_force(model, ids[row][real], method, row)
        assert torch.allclose(out[row][real], expected, atol=3e-4), row
    away = [site for site, kind in method.kind.items() if kind in ("static", "dropped")]
    assert usage.dropped == {unit for site in away for unit in site.units}
    assert all(usage.executed[unit] == 0 for unit in usage.dropped)
    assert usage.decided.keys() == {s for s, kind in method.kind.items() if kind == "routed"}


@pytest.mark.parametrize("turn", range(4))
@pytest.mark.parametrize("rows", [1, ROWS])
@pytest.mark.parametrize("mode, linear", [("masked", 0), ("gathered", 0), ("gathered", 1)])
@torch.no_grad()
def test_chunks_and_single_tokens_equal_one_pass(mode, linear, rows, turn):
    model, ids = small_model(layers=LAYERS), small_ids(rows, 12)
    method = Mixed(all_sites(model, "unit"), linear=bool(linear), turn=turn)
    with routed(model, method, mode):
        cache, parts = preallocated_cache(model), []
        for start, end in ((0, 4), (4, 9), (9, 10), (10, 11), (11, 12)):
            out = model(input_ids=ids[:, start:end], past_key_values=cache)
            parts.append(out.logits)
    for row in range(rows):
        expected = brute_force(model, ids[row], method, row)
        assert torch.allclose(torch.cat(parts, 1)[row], expected, atol=3e-4)
    # no keys and values; the first layer's are placeholders, off which a cache's length is read
    for site, kind in method.kind.items():
        if site.kind == "attention" and kind in ("static", "dropped") and site.layer:
            assert cache.layers[site.layer].get_seq_length() == 0


class MixedLinear(Linear):
    """Linear routers and forecasters; some units are executed, dropped or estimated for all."""

    STATIC = (Site(0, "attention"), Site(2, "mlp"))

    def fixed(self):
        away = dict.fromkeys((*self.STATIC, Site(1, "attention")), False)
        return {**away, Site(1, "mlp"): True}

    def estimated(self):
        return self.STATIC


@pytest.mark.parametrize("silu", [True, False])
@torch.no_grad()
def test_one_token_of_linear_sites_equals_masked(silu):
    model, ids = small_model(layers=LAYERS), small_ids(1, 14)
    method = MixedLinear(all_sites(model, "unit"), 0.0, forecast=True, silu=silu)
    found = []
    for mode in ("masked", "gathered"):
        with routed(model, method, mode):
            cache, parts = preallocated_cache(model), []
            for start, end in [(0, 6), *((t, t + 1) for t in range(6, 14))]:
                out = model(input_ids=ids[:, start:end], past_key_values=cache)
                parts.append(out.logits)
            found.append((torch.cat(parts, 1), routing_of(model).counters.read().executed))
    assert torch.allclose(found[0][0], found[1][0], atol=2e-4)
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize("granularity", ["unit", "block"])
def test_costs_no_router_and_no_keys(granularity):
    model, ids = small_model(layers=LAYERS), small_ids(ROWS, 12)
    sites = all_sites(model, granularity)
    method = Mixed(sites)
    asked = Mixed(sites)  # the same decisions, each made by a router
    asked.fixed, asked.estimated = dict, tuple  # type: ignore[method-assign]
    asked.route = lambda *args: Scripted.route(asked, *args)  # type: ignore[method-assign]
    mask = torch.ones_like(ids)
    usage = logits_of(model, method, ids, mask, "gathered")[1]
    routed_usage = logits_of(model, asked, ids, mask, "gathered")[1]
    assert usage.sparsity() == pytest.approx(routed_usage.sparsity())
    kinds = [method.kind[site] for site in sites]
    attends = [s.kind != "mlp" and k in ("static", "dropped") for s, k in method.kind.items()]
    cost, keys = method.cost(sites[0]), 2 * 2 * WIDTH * 2 * 12
    saved = usage.tokens * (
        cost.route * (len(sites) - kinds.count("routed"))
        + cost.approximate * kinds.count("dropped")
        + keys * sum(attends)
    )
    whole = flops_ratio(asked, routed_usage) - flops_ratio(method, usage)
    dense = dense_flops(usage.shape, tokens=usage.tokens, context=usage.context)
    assert whole * dense == pytest.approx(saved)
    assert kv_bytes_ratio(method, usage) == 1.0 - sum(attends) / LAYERS
    own = routed_bytes(model, method, usage)
    method.cost = lambda site: Method.cost(method, site)  # type: ignore[method-assign]
    free = routed_bytes(model, method, usage)
    rates = sum(usage.bypassing[s] for s in usage.decided)
    bypassed = kinds.count("static") + rates
    assert own - free == 2 * (kinds.count("routed") * cost.route + bypassed * cost.approximate)


class Residual(Mixed):
    """A static site gets a tenth of the residual stream itself, negated."""

    def estimate(self, site, x_BTD, ctx):
        return -0.1 * ctx.residual_BTD


@pytest.mark.parametrize("mode", ["masked", "gathered"])
@torch.no_grad()
def test_an_estimate_may_read_the_stream_without_the_norm(mode):
    model, ids = small_model(layers=1), small_ids(ROWS, 12)
    method = Residual([Site(0, "attention")])
    out, _ = logits_of(model, method, ids, torch.ones_like(ids), mode)
    stream = 0.9 * model.model.embed_tokens(ids)
    layer = model.model.layers[0]
    stream = stream + layer.mlp(layer.post_attention_layernorm(stream))
    assert torch.allclose(out, model.lm_head(model.model.norm(stream)), atol=1e-5)


def test_what_is_not_bypassed_by_all_cannot_be_estimated():
    model = small_model()
    method = Mixed(all_sites(model, "unit"))
    method.estimated = lambda: [Site(0, "attention"), Site(1, "attention")]
    with (
        pytest.raises(BrokenContract, match=r"estimated\(\) names 1_attention, which fixed\(\)"),
        routed(model, method),
    ):
        pass


@pytest.mark.parametrize("target", [0.45, 0.6, 0.8])
def test_calibration_counts_what_all_bypass(target):
    model = small_model(layers=LAYERS)
    method = MixedLinear(all_sites(model, "unit"), 0.0, forecast=True, silu=False)
    text = ProbeText(small_ids(4, 16), small_ids(24, 32), small_ids(1, 16))
    probe = ModelProbe(model, method, text)
    assert calibrate_threshold(probe, target).sparsity == pytest.approx(target, abs=0.005)
