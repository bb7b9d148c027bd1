"""What a routed model still is inside its block, and what it refuses in one line."""

from __future__ import annotations

import copy
import pickle
from threading import Thread

import pytest
import torch
from transformers import AutoModelForCausalLM

from methods.base import LoraSpec, Site
from methods.engine.lora import attach_lora
from methods.engine.routed import attach, routed
from methods.engine.routing import routing_of
from methods.informed import Informed
from tests.methods.conftest import small_ids, small_model
from tests.methods.engine.scripted import Scripted, all_sites, random_maps, random_tables

MODES = ("masked", "gathered")


def informed(model, kv_policy="keep", *, lora=False, merged=False):
    method = attach(model, Informed(sparsity=0.5, rank=4, kv_policy=kv_policy)).eval()
    if lora:
        attach_lora(model, method, LoraSpec(rank=2, targets=["k", "v", "gate"])).merged = merged
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.normal_(std=0.3)
        method.threshold.fill_(0.0)
    return method


@pytest.mark.parametrize("lora", ["none", "added", "merged"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("policy", ["keep", "evict", "forecast"])
@torch.no_grad()
def test_no_weight_is_lost_inside_the_block(policy, mode, lora, tmp_path):
    model, ids = small_model(), small_ids(2, 8)
    names = [name for name, _ in model.named_modules()]
    types = [type(module) for module in model.modules()]
    weights, dense = dict(model.named_parameters()), model(input_ids=ids).logits
    state = {name: value.clone() for name, value in model.state_dict().items()}
    method = informed(model, policy, lora=lora != "none", merged=lora == "merged")
    with routed(model, method, mode):
        model(input_ids=ids)
        assert [name for name, _ in model.named_modules()] == names
        assert [type(module) for module in model.modules()] == types
        inside = dict(model.named_parameters())
        assert inside.keys() == weights.keys() and all(inside[k] is weights[k] for k in weights)
        assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())
        model.save_pretrained(tmp_path)
        if lora != "merged":
            assert model.to(torch.float64)(input_ids=ids).logits.dtype == torch.float64
    assert {value.dtype for value in weights.values()} <= {torch.float64, torch.float32}
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(input_ids=ids).logits, dense)


@pytest.mark.parametrize("mode", MODES)
def test_a_copy_inside_the_block_is_refused(mode):
    model = small_model()
    layer = model.model.layers[1]
    with routed(model, informed(model, "forecast", lora=True), mode):
        for thing in (model, layer, layer.self_attn, layer.self_attn.k_proj):
            with pytest.raises(ValueError, match="leave the block first"):
                copy.deepcopy(thing)
        with pytest.raises(ValueError, match="leave the block first"):
            pickle.dumps(layer)
    assert copy.deepcopy(model) is not model


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_two_threads_get_the_numbers_of_one(mode, kernels):
    """Of different lengths, so that row numbers of one are outside of the other's buffers."""
    model = small_model(layers=4)
    sites = all_sites(model, "unit")
    method = Scripted(random_tables(sites, rows=2, positions=200), random_maps(sites, 32))
    texts, wrong = [small_ids(2, 150), small_ids(1, 9)], []
    with routed(model, method, mode, kernels=kernels):
        expected = [model(input_ids=ids).logits for ids in texts]

        @torch.no_grad()
        def run(which):
            for _ in range(12):
                found = model(input_ids=texts[which]).logits
                same = found.shape == expected[which].shape
                if not same or not torch.equal(found, expected[which]):
                    wrong.append(which)

        threads = [Thread(target=run, args=(which,)) for which in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert routing_of(model).counters.read().tokens == 13 * (2 * 150 + 9)


@torch.no_grad()
def test_hooks_on_norms_run():
    model, seen = small_model(), []
    norms = {n: m for n, m in model.model.layers.named_modules() if n.endswith("layernorm")}
    for name, norm in norms.items():
        norm.register_forward_hook(lambda *_, name=name: seen.append(name))
    for tokens in (8, 1):
        seen.clear()
        with routed(model, informed(model), "gathered"):
            model(input_ids=small_ids(1, tokens))
        assert sorted(seen) == sorted(norms)


@pytest.mark.parametrize("name", ["self_attn", "mlp"])
@torch.no_grad()
def test_hooks_run_or_are_refused(name):
    model, ids, seen = small_model(), small_ids(2, 8), []
    layer, method = model.model.layers[1], informed(model)
    hook = layer.get_submodule(name).register_forward_hook(lambda *_: seen.append(name))
    with routed(model, method):
        model(input_ids=ids)
    assert seen == [name]
    with routed(model, method, "gathered"):
        with pytest.raises(ValueError, match="forward hooks would not run"):
            model(input_ids=ids)
        hook.remove()
        layer.register_forward_hook(lambda *_: seen.append("layer"))
        model(input_ids=ids, output_hidden_states=True)
        model(input_ids=ids)
    assert seen == [name, "layer", "layer"]


@torch.no_grad()
def test_attention_maps_are_right_or_refused():
    model, ids = small_model(layers=3), small_ids(2, 8)
    model.set_attn_implementation("eager")
    sites = all_sites(model, "unit")
    tables = random_tables(sites, rows=2)

    class Dropping(Scripted):
        def fixed(self):
            return {Site(1, "attention"): False}

    with routed(model, Scripted(tables)):
        maps = model(input_ids=ids, output_attentions=True).attentions
    assert len(maps) == 3 and all(torch.allclose(m.sum(-1), torch.ones(())) for m in maps)
    for method, mode in ((Scripted(tables), "gathered"), (Dropping(tables), "masked")):
        with routed(model, method, mode), pytest.raises(ValueError, match="output_attentions"):
            model(input_ids=ids, output_attentions=True)


@torch.no_grad()
def test_other_attention_implementations_and_masks_are_refused_where_they_are_not_followed():
    model, ids = small_model(), small_ids(1, 8)
    method = Scripted(random_tables(all_sites(model, "unit"), rows=1), kv_policy="evict")
    packed = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    own = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
    for mode in MODES:
        with routed(model, method, mode):
            for options in ({"position_ids": packed}, {"attention_mask": own}):
                with pytest.raises(ValueError, match="attention_mask of padding"):
                    model(input_ids=ids, **options)
            model(input_ids=ids, position_ids=torch.arange(8)[None])
    model.set_attn_implementation("flex_attention")
    with (
        routed(model, Scripted(method.tables), "gathered"),
        pytest.raises(ValueError, match="sdpa or eager, not flex_attention"),
    ):
        model(input_ids=ids)
