"""Adapters of the backbone against peft's own model, and the base model untouched around them."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from methods.base import LoraSpec
from methods.engine.checkpoint import ADAPTER_TENSORS, BadCheckpoint, from_pretrained
from methods.engine.checkpoint import save_pretrained as save
from methods.engine.decoder.families import FAMILIES
from methods.engine.lora import attach_lora
from methods.engine.routed import attach, routed
from methods.engine.routing import routing_of
from methods.informed import Informed
from tests.methods.conftest import small_ids, small_model

SPEC = LoraSpec(rank=3, alpha=5, dropout=0.5, targets=["q", "v", "gate", "down"])
OPTIONS = {"sparsity": 0.5, "rank": 4}
TARGET = "methods.informed.Informed"


@pytest.fixture
def model():
    return small_model()


@pytest.fixture
def method(model):
    return with_adapter(model)


def with_adapter(model, *, threshold=-0.05):
    """Routers, forecasters and both factors random."""
    method = attach(model, Informed(**OPTIONS)).eval()
    attach_lora(model, method, SPEC)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.normal_(std=0.2)
    method.threshold.fill_(threshold)
    return method


@torch.no_grad()
def logits(model, method, ids, mode="masked"):
    with routed(model, method, mode):
        return model(input_ids=ids).logits


def test_a_fresh_adapter_changes_nothing(model):
    method = attach(model, Informed(**OPTIONS)).eval()
    method.threshold.fill_(0.0)
    ids = small_ids(2, 9)
    before = logits(model, method, ids)
    attach_lora(model, method, SPEC)
    assert torch.equal(logits(model, method, ids), before)


def test_everything_executed_equals_pefts_own_model(family_model, tmp_path):
    """The saved folder, opened with peft, is the routed model at sparsity 0."""
    if FAMILIES[family_model.config.model_type].experts:
        with pytest.raises(ValueError, match="has no projection down_proj, gate_proj"):
            with_adapter(family_model)
        return
    method = with_adapter(family_model, threshold=float("-inf"))
    save(method, tmp_path, target=TARGET, options=OPTIONS, base={})
    ids = small_ids(2, 9)
    dense = family_model(input_ids=ids).logits
    reference = PeftModel.from_pretrained(copy.deepcopy(family_model), tmp_path).eval()
    expected = reference(input_ids=ids).logits
    assert not torch.allclose(expected, dense, atol=0.1)
    assert torch.allclose(logits(family_model, method, ids), expected, atol=1e-5)


@pytest.mark.parametrize("mode", ["masked", "gathered"])
def test_merged_gives_the_same_numbers(model, method, mode):
    ids = small_ids(3, 9)
    apart = logits(model, method, ids, mode)
    method.adapter.merged = True
    assert torch.allclose(logits(model, method, ids, mode), apart, atol=1e-4)
    with routed(model, method, mode):
        assert type(model.model.layers[0].mlp.down_proj) is torch.nn.Linear


@pytest.mark.parametrize("merged", [False, True])
def test_the_base_model_is_restored_bit_for_bit(model, merged):
    weights = {k: (v, v.clone()) for k, v in model.state_dict(keep_vars=True).items()}
    names, attributes = [n for n, _ in model.named_modules()], set(model.__dict__)
    ids = small_ids(2, 9)
    dense = model(input_ids=ids).logits
    method = with_adapter(model)
    method.adapter.merged = merged
    with pytest.raises(RuntimeError, match="stop"), routed(model, method):
        model(input_ids=ids)
        raise RuntimeError("stop")
    assert [n for n, _ in model.named_modules()] == names and set(model.__dict__) == attributes
    for name, value in model.state_dict(keep_vars=True).items():
        assert value is weights[name][0] and torch.equal(value, weights[name][1]), name
    assert torch.equal(model(input_ids=ids).logits, dense)
    assert not any(p.requires_grad for p in model.parameters())


def test_a_paused_model_is_the_dense_one(model, method):
    ids = small_ids(2, 9)
    dense = model(input_ids=ids).logits
    with routed(model, method), torch.no_grad():
        first = model(input_ids=ids).logits
        with routing_of(model).dense():
            assert torch.equal(model(input_ids=ids).logits, dense)
        assert torch.equal(model(input_ids=ids).logits, first)


def test_dropout_acts_in_training_only(model, method):
    ids = small_ids(2, 9)
    assert torch.equal(logits(model, method, ids), logits(model, method, ids))
    method.train()
    assert not torch.equal(logits(model, method, ids), logits(model, method, ids))
    method.eval()
    assert torch.equal(logits(model, method, ids), logits(model, method, ids))


def test_round_trip_is_strict(model, method, tmp_path):
    save(method, tmp_path, target=TARGET, options=OPTIONS, base={})
    ids = small_ids(2, 9)
    again = from_pretrained(tmp_path, model)
    assert torch.equal(logits(model, again, ids), logits(model, method, ids))
    assert again.state_dict().keys() == method.state_dict().keys()
    path = tmp_path / ADAPTER_TENSORS
    tensors = load_file(path)
    save_file(dict(list(tensors.items())[1:]), path)
    with pytest.raises(BadCheckpoint, match="does not fit"):
        from_pretrained(tmp_path, model)
    path.unlink()
    with pytest.raises(BadCheckpoint, match="missing"):
        from_pretrained(tmp_path, model)


def test_two_methods_share_one_base_model(model):
    ids = small_ids(2, 9)
    first, second = with_adapter(model), with_adapter(model)
    before = logits(model, first, ids)
    logits(model, second, ids)
    assert torch.equal(logits(model, first, ids), before)


def test_factors_stay_float32_and_start_from_the_seed():
    model = small_model().bfloat16()
    method = attach(model, Informed(**OPTIONS))
    other = attach(model, Informed(**OPTIONS))
    adapter = attach_lora(model, method, SPEC, seed=4)
    again = attach_lora(model, other, SPEC, seed=4)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    for a, b in zip(adapter.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    method.threshold.fill_(0.0)
    assert logits(model, method.eval(), small_ids(2, 9)).dtype == torch.bfloat16


def test_mistakes_are_named(model, method):
    with pytest.raises(ValueError, match="already has"):
        attach_lora(model, method, LoraSpec())
    with pytest.raises(ValueError, match="targets must be among"):
        LoraSpec(targets=["query"])
