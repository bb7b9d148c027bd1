"""Families: what is found in a supported one, and the error for every other."""

from __future__ import annotations

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from methods.dense import Dense
from methods.engine.decoder.families import (
    FAMILIES,
    UnsupportedModel,
    layers_of,
    require_family,
    shape_of,
)
from methods.engine.routed import attach, routed
from tests.methods.conftest import small_model


def gpt2():
    config = AutoConfig.for_model("gpt2", vocab_size=50, n_embd=16, n_layer=1, n_head=2)
    return AutoModelForCausalLM.from_config(config)


def test_the_required_families_are_there():
    assert {"llama", "mistral", "qwen2", "qwen3"} <= FAMILIES.keys()


def test_sizes_equal_the_weights(family_model):
    shape, layer = shape_of(family_model.config), family_model.model.layers[0]
    attention = layer.self_attn
    assert shape.layers == len(layers_of(family_model)) == 2
    assert tuple(attention.q_proj.weight.shape) == (shape.heads * shape.head_dim, shape.width)
    assert tuple(attention.k_proj.weight.shape) == (shape.kv_heads * shape.head_dim, shape.width)
    assert tuple(layer.mlp.up_proj.weight.shape) == (shape.mlp_width, shape.width)
    assert tuple(family_model.lm_head.weight.shape) == (shape.vocab, shape.width)


def test_parts_are_the_layers_own_modules(family_model):
    for part, layer in zip(layers_of(family_model), family_model.model.layers, strict=True):
        assert part.layer is layer
        assert (part.attention_norm, part.attention) == (layer.input_layernorm, layer.self_attn)
        assert (part.mlp_norm, part.mlp) == (layer.post_attention_layernorm, layer.mlp)


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
