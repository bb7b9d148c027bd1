"""KV policy `forecast`: estimated keys for bypassed tokens, in every path, restored after."""

from __future__ import annotations

import pytest
import torch

from methods.base import Site
from methods.engine.decoder.families import FAMILIES
from methods.engine.measure.flops import kv_bytes_ratio, routed_flops
from methods.engine.routed import attach, routed
from methods.informed import Informed
from methods.informed_plus import InformedPlus
from tests.conftest import token_rows
from tests.methods.by_hand import BUDGET
from tests.methods.conftest import PLAIN, probe_for, small_ids, small_model


def informed(model, *, kv_policy="forecast", threshold=0.0, **options):
    """Random routers and forecasters, the same whatever the policy."""
    method = attach(model, Informed(sparsity=0.4, kv_policy=kv_policy, **({"rank": 4} | options)))
    torch.manual_seed(5)
    with torch.no_grad():
        for part in (method.routers, method.forecasters):
            for parameter in part.parameters():
                parameter.normal_(std=0.3)
        method.threshold.fill_(threshold)
    return method.eval()


@torch.no_grad()
def run(model, method, ids, mode="masked", **inputs):
    with routed(model, method, mode):
        logits = model(input_ids=ids, **inputs).logits
        return logits, model.routing.counters.read()


def fill(method, value=None):
    """Random (or constant) key maps."""
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in method.keys.parameters():
            parameter.normal_(std=0.5) if value is None else parameter.fill_(value)
    return method


@pytest.mark.parametrize("family", sorted({*FAMILIES} - {"phi3"}))
def test_every_path_takes_the_estimates(family):
    model, ids = small_model(family), small_ids(2, 9)
    method = fill(informed(model))
    whole, usage = run(model, method, ids)
    gathered, _ = run(model, method, ids, "gathered")
    assert torch.allclose(gathered, whole, atol=1e-4) and 0.1 < usage.sparsity() < 0.9
    with torch.no_grad():
        assert not torch.allclose(whole, run(model, fill(method, 0.0), ids)[0], atol=1e-3)


def test_one_projection_of_all_three_is_refused():
    with pytest.raises(ValueError, match="needs k_proj and v_proj, which Phi3Attention has not"):
        informed(small_model("phi3"))


@pytest.mark.parametrize("family", [*PLAIN, "mixtral", "qwen3_moe"])
def test_attention_over_the_estimates_by_hand(family):
    """The first layer's attention of the last token, from its own projections."""
    model, ids = small_model(family), small_ids(1, 7)
    method = fill(informed(model))
    site, layer = Site(0, "attention"), model.model.layers[0]
    attention = layer.self_attn
    kept: dict[str, torch.Tensor] = {}
    attention.o_proj.register_forward_pre_hook(
        lambda _, args: kept.setdefault("heads", args[0].detach())
    )
    with torch.no_grad(), routed(model, method):
        model.routing.observer = lambda at, decision, _: kept.setdefault(
            "execute", decision.execute_BT
        )
        model(input_ids=ids)
        x = layer.input_layernorm(model.model.embed_tokens(ids))
    with torch.no_grad():
        projections = torch.cat([attention.k_proj(x), attention.v_proj(x)], -1)
        code = method.forecasters.at(site).down(x)
        linear = method.keys.modules_by_site[site.key]
        estimate = code @ linear.weight.T + linear.bias
        both = torch.where(kept["execute"][..., None], projections, estimate)
        size, tokens = attention.head_dim, ids.shape[1]
        key, value = (t.view(1, tokens, -1, size).transpose(1, 2) for t in both.chunk(2, -1))
        query = attention.q_proj(x).view(1, tokens, -1, size).transpose(1, 2)
        if hasattr(attention, "k_norm"):
            query, key = attention.q_norm(query), attention.k_norm(key)
        cos, sin = model.model.rotary_emb(x, torch.arange(tokens)[None])

        def turned(t):
            a, b = t.chunk(2, -1)
            return t * cos[:, None] + torch.cat([-b, a], -1) * sin[:, None]

        query, key = turned(query), turned(key)
        groups = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
        weight = torch.softmax(query[:, :, -1:] @ key.transpose(2, 3) * attention.scaling, -1)
        expected = (weight @ value)[:, :, 0].flatten(1)
    assert 0 < int(kept["execute"].sum()) < tokens
    assert torch.allclose(kept["heads"][:, -1], expected, atol=1e-4)


def test_gathered_and_decode_equal_the_masked_pass():
    model, ids = small_model(), small_ids(2, 12)
    own = fill(informed(model))
    whole, usage = run(model, own, ids)
    gathered, usage_gathered = run(model, own, ids, "gathered")
    assert torch.allclose(gathered, whole, atol=1e-4)
    assert usage.executed == usage_gathered.executed and 0.2 < usage.sparsity() < 0.8
    for mode in ("masked", "gathered"):
        with torch.no_grad(), routed(model, own, mode):
            cache, parts = None, []
            for start, end in ((0, 5), (5, 10), (10, 11), (11, 12)):
                out = model(input_ids=ids[:, start:end], past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                parts.append(out.logits)
        assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-4)


@pytest.mark.parametrize("mode", ["masked", "gathered"])
def test_one_token_at_a_time_takes_the_estimates(mode):
    """A single sequence on the host has a path of its own, which must not serve this policy."""
    model, ids = small_model(), small_ids(1, 8)
    own = fill(informed(model))
    whole, _ = run(model, own, ids)
    with torch.no_grad(), routed(model, own, mode):
        cache, parts = None, []
        for place in range(8):
            step = ids[:, place : place + 1]
            out = model(input_ids=step, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-4)


def test_padding_changes_nothing():
    model, ids = small_model(), small_ids(1, 9)
    own = fill(informed(model))
    alone, _ = run(model, own, ids)
    pad = torch.zeros(1, 4, dtype=torch.long)
    for order in ((pad, ids), (ids, pad)):
        tokens = torch.cat(order, 1)
        mask = torch.cat([torch.full_like(t, t is ids) for t in order], 1)
        padded, _ = run(model, own, tokens, attention_mask=mask)
        assert torch.allclose(padded[mask.bool()], alone[0], atol=1e-4)


def test_exact_maps_are_policy_keep(tiny_llama):
    """K and V are linear in x: a bottleneck of full rank loses nothing."""
    ids = token_rows(2, 20)
    method = informed(tiny_llama, rank=64, forecaster={"damping": 1e-9})
    method.keys.fit(probe_for(tiny_llama, method))
    forecast, _ = run(tiny_llama, method, ids)
    keep, _ = run(tiny_llama, informed(tiny_llama, kv_policy="keep", rank=64), ids)
    fill(method, 0.0)
    nothing, _ = run(tiny_llama, method, ids)
    assert torch.allclose(forecast, keep, atol=2e-3)
    assert not torch.allclose(nothing, keep, atol=2e-2)


def test_bytes_and_flops_are_those_of_the_codes(tiny_llama):
    ids = token_rows(2, 20)
    method = fill(informed(tiny_llama))
    usage = run(tiny_llama, method, ids)[1]
    shape, share = usage.shape, usage.sparsity("attention")
    numbers = 2 * shape.kv_heads * shape.head_dim
    assert 0.1 < share < 0.9
    assert kv_bytes_ratio(method, usage) == pytest.approx(1 - share + share * 4 / numbers)
    others = {p: informed(tiny_llama, kv_policy=p) for p in ("keep", "evict")}
    assert kv_bytes_ratio(others["keep"], usage) == 1.0
    assert kv_bytes_ratio(others["evict"], usage) == pytest.approx(1 - share)
    saved = share * shape.layers * usage.tokens * 2.0 * numbers * (shape.width - 4)
    difference = routed_flops(others["keep"], usage) - routed_flops(method, usage)
    assert difference == pytest.approx(saved)


def test_the_model_is_restored_and_dense_while_paused(tiny_llama):
    ids = token_rows(2, 12)
    dense = tiny_llama(input_ids=ids).logits
    modules = [name for name, _ in tiny_llama.named_modules()]
    method = fill(informed(tiny_llama))
    with pytest.raises(RuntimeError, match="stop"), torch.no_grad(), routed(tiny_llama, method):
        tiny_llama(input_ids=ids)
        with tiny_llama.routing.dense():
            assert torch.equal(tiny_llama(input_ids=ids).logits, dense)
        raise RuntimeError("stop")
    assert [name for name, _ in tiny_llama.named_modules()] == modules
    assert torch.equal(tiny_llama(input_ids=ids).logits, dense)


def test_maps_follow_allocated_ranks(tiny_llama):
    method = attach(tiny_llama, InformedPlus(sparsity=0.4, rank=4, kv_policy="forecast"))
    probe = probe_for(tiny_llama, method)
    for stage in method.stages(BUDGET):
        if stage.name in ("forecasters", "keys"):
            stage.fit(probe)
    other = attach(tiny_llama, InformedPlus(sparsity=0.4, rank=4, kv_policy="forecast"))
    state = method.state_dict()
    other.adopt({name: value.shape for name, value in state.items()})
    other.load_state_dict(state)
    ranks = {method.forecasters.at(site).rank for site in method.sites()}
    assert len(ranks) > 1


def test_unknown_policies_are_named(tiny_llama):
    with pytest.raises(ValueError, match="kv_policy must be one of keep, evict, forecast"):
        attach(tiny_llama, Informed(sparsity=0.4, rank=4, kv_policy="forget"))
