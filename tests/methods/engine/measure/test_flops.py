"""Analytic FLOPs against torch's counter and against a sum over tokens and weights."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from methods.dense import Dense
from methods.engine.decoder.families import FAMILIES, shape_of
from methods.engine.measure.flops import dense_flops, flops_ratio, routed_flops
from methods.engine.routed import attach, routed
from methods.engine.routing import routing_of
from methods.informed import Informed
from tests.methods.conftest import small_ids, small_model
from tests.methods.engine.scripted import Scripted, all_sites, padded, random_tables


def counted(run, skip=()):
    """FLOPs that torch counts in `run`, less those of modules whose name contains `skip`."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    left_out = [
        sum(ops.values())
        for name, ops in counter.get_flop_counts().items()
        if any(word in name for word in skip)
    ]
    return counter.get_total_flops() - sum(left_out)


def usage_of(model, method, ids, mask=None):
    with torch.no_grad(), routed(model, method):
        model(input_ids=ids, attention_mask=mask)
        return routing_of(model).counters.read()


def test_dense_flops_equal_torchs_count(family_model):
    """Eager attention multiplies every query with every key, so its context is T per token."""
    rows, tokens = 2, 11
    family_model.set_attn_implementation("eager")
    family_model.config._experts_implementation = "eager"
    ids = small_ids(rows, tokens)
    total = counted(lambda: family_model(input_ids=ids), skip=["rotary_emb"])
    shape = shape_of(family_model.config)
    for layer in family_model.model.layers:
        if hasattr(layer.mlp, "experts"):  # the choice of experts is left out, as norms are
            total -= 2 * rows * tokens * layer.mlp.gate.weight.numel()
        elif FAMILIES[family_model.config.model_type].experts:
            other = shape.mlp_width - layer.mlp.up_proj.out_features
            total += 6 * rows * tokens * shape.width * other
    assert dense_flops(shape, tokens=rows * tokens, context=rows * tokens**2) == total


def linear_flops(module):
    return 2 * module.weight.numel()


def token_by_token(model, method, lengths, *, keep_kv):
    """Sum over sequences, tokens and modules of a routed forward."""
    total, config = 0.0, model.config
    for row, length in enumerate(lengths):
        for place in range(length):
            total += linear_flops(model.lm_head)
            for site, table in method.tables.items():
                layer, execute = model.model.layers[site.layer], bool(table[row, place])
                cost = method.cost(site)
                total += cost.route + (0 if execute else cost.approximate)
                heads = layer.self_attn
                kinds = {unit.kind for unit in site.units}
                if "mlp" in kinds and execute:
                    mlp = layer.mlp
                    total += sum(map(linear_flops, (mlp.gate_proj, mlp.up_proj, mlp.down_proj)))
                if "attention" not in kinds:
                    continue
                if execute or keep_kv:
                    total += linear_flops(heads.k_proj) + linear_flops(heads.v_proj)
                if execute:
                    total += linear_flops(heads.q_proj) + linear_flops(heads.o_proj)
                    one_key = config.num_attention_heads * heads.head_dim * 2
                    keys = place + 1 if keep_kv else int(table[row, : place + 1].sum())
                    total += 2 * one_key * keys
    return total


@pytest.mark.parametrize("policy", ["keep", "evict"])
@pytest.mark.parametrize("granularity", ["unit", "block"])
def test_routed_flops_equal_a_sum_over_tokens(granularity, policy):
    model, pads = small_model("qwen3"), (0, 3)
    tables = random_tables(all_sites(model, granularity), rows=2)
    method = Scripted(tables, kv_policy=policy)
    usage = usage_of(model, method, *padded(small_ids(2, 9), pads, "left"))
    expected = token_by_token(model, method, [9 - p for p in pads], keep_kv=policy == "keep")
    assert routed_flops(method, usage) == pytest.approx(expected, rel=1e-12)
    dense = dense_flops(usage.shape, tokens=usage.tokens, context=usage.context)
    assert flops_ratio(method, usage) == pytest.approx(expected / dense, rel=1e-12)


def test_dense_method_has_ratio_one():
    model = small_model()
    usage = usage_of(model, attach(model, Dense(sparsity=0.0)), small_ids(2, 7))
    assert flops_ratio(attach(model, Dense(sparsity=0.0)), usage) == 1.0


@pytest.mark.parametrize("router", ["linear", "mlp"])
def test_costs_of_a_method_equal_torchs_count(router):
    model = small_model()
    method = attach(model, Informed(sparsity=0.5, rank=4, router={"kind": router}))
    x = torch.randn(1, 32)
    for site in method.sites():
        cost = method.cost(site)
        assert cost.route == counted(lambda s=site: method.routers(s, x))
        assert cost.approximate == counted(lambda s=site: method.approximate(s, x))
