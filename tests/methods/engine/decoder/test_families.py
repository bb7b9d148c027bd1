"""Families: what is found in a supported one, and the error for every other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from methods.dense import Dense
from methods.engine.decoder.families import (
    FAMILIES,
    UnsupportedModel,
    decoder,
    layers_of,
    require_family,
    shape_of,
)
from methods.engine.decoder.head import Head
from methods.engine.routed import attach, routed
from runners.training.losses import _cross_entropy, _head_loss
from tests.methods.conftest import small_ids, small_model


def gpt2():
    config = AutoConfig.for_model("gpt2", vocab_size=50, n_embd=16, n_layer=1, n_head=2)
    return AutoModelForCausalLM.from_config(config)


def test_sizes_equal_the_weights(family_model):
    shape, layer = shape_of(family_model.config), family_model.model.layers[0]
    attention, mlp = layer.self_attn, layer.mlp
    assert shape.layers == len(layers_of(family_model)) == 2
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    if hasattr(attention, "qkv_proj"):
        assert tuple(attention.qkv_proj.weight.shape) == (query + 2 * key, shape.width)
        assert tuple(mlp.gate_up_proj.weight.shape) == (2 * shape.mlp_width, shape.width)
    else:
        assert tuple(attention.q_proj.weight.shape) == (query, shape.width)
        assert tuple(attention.k_proj.weight.shape) == (key, shape.width)
    if hasattr(mlp, "experts"):
        _, outputs, width = mlp.experts.gate_up_proj.shape
        assert (mlp.gate.top_k * outputs // 2, width) == (shape.mlp_width, shape.width)
    elif hasattr(mlp, "up_proj"):
        assert tuple(mlp.up_proj.weight.shape) == (shape.mlp_width, shape.width)
    assert tuple(family_model.lm_head.weight.shape) == (shape.vocab, shape.width)


def test_parts_are_the_layers_own_modules(family_model):
    for part, layer in zip(layers_of(family_model), family_model.model.layers, strict=True):
        assert part.layer is layer
        assert (part.attention, part.mlp) == (layer.self_attn, layer.mlp)
        own = set(layer.children())
        norms = {part.attention_norm, part.mlp_norm, part.attention_after, part.mlp_after}
        used = {norm for norm in norms if norm in own} | {part.attention, part.mlp}
        assert own - used <= {getattr(layer, f"resid_{n}_dropout", None) for n in ("attn", "mlp")}


WRONG = {
    "gemma2": {"mlp_after": None},
    "gemma3_text": {"attention_after": "input_layernorm"},
    "granite": {"multiplier": None},
    "llama": {"mlp_norm": "input_layernorm"},
    "olmo2": {"attention_norm": "post_attention_layernorm"},
    "smollm3": {"mlp_norm": None},
}


@pytest.mark.parametrize("family", sorted(WRONG))
def test_attach_refuses_a_line_that_gives_other_numbers(family, monkeypatch):
    model = small_model(family)
    attach(model, Dense(sparsity=0.0))
    monkeypatch.setitem(FAMILIES, family, replace(FAMILIES[family], **WRONG[family]))
    with pytest.raises(UnsupportedModel, match=f"adapter of {family} gives other numbers") as said:
        attach(model, Dense(sparsity=0.0))
    assert "\n" not in str(said.value)
    assert not hasattr(model, "routing") and model.training is False


def test_attach_refuses_an_attention_that_gathered_execution_reads_otherwise(monkeypatch):
    """The modules run and agree; only what reads their weights is wrong."""
    model = small_model("gemma2", attn_logit_softcapping=1.5)
    monkeypatch.setitem(FAMILIES, "gemma2", replace(FAMILIES["gemma2"], capped=False))
    with pytest.raises(UnsupportedModel, match="in mode gathered"):
        attach(model, Dense(sparsity=0.0))


@torch.no_grad()
def test_the_head_gives_the_models_own_logits(family_model):
    ids = small_ids(1, 9)
    hidden = decoder(family_model)(input_ids=ids)[0]
    expected = family_model(input_ids=ids).logits
    assert torch.allclose(Head(family_model)(hidden), expected, atol=1e-5)


@pytest.mark.parametrize("family", ["gemma2", "granite", "llama"])
def test_losses_are_those_of_the_models_logits(family):
    """With the gradient that autograd finds through the model's own head."""
    model, ids = small_model(family), small_ids(2, 9)
    hidden = decoder(model)(input_ids=ids)[0].detach().requires_grad_(True)
    logits = Head(model)(hidden[:, :-1].flatten(0, 1))
    functional.cross_entropy(logits, ids[:, 1:].flatten()).backward()
    ours = hidden.detach().clone().requires_grad_(True)
    loss = _head_loss(model, ours[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), _cross_entropy)
    (loss / ids[:, 1:].numel()).backward()
    assert torch.allclose(ours.grad, hidden.grad, atol=1e-6)


@pytest.mark.parametrize(
    "use",
    [
        lambda model: routed(model, Dense(sparsity=0.0)).__enter__(),
        lambda model: attach(model, Dense(sparsity=0.0)),
        lambda model: shape_of(model.config),
        lambda model: layers_of(model),
        lambda model: require_family(model.config.model_type),
    ],
)
def test_an_unsupported_family_is_one_clear_error(use):
    with pytest.raises(UnsupportedModel, match="no adapter for model family 'gpt2'") as caught:
        use(gpt2())
    assert all(family in str(caught.value) for family in FAMILIES)
    assert "\n" not in str(caught.value)


def test_a_layer_without_the_expected_module_is_refused():
    model = small_model()
    del model.model.layers[1].mlp
    with pytest.raises(UnsupportedModel, match=r"unexpected layer in llama.*mlp"):
        routed(model, Dense(sparsity=0.0)).__enter__()
