"""Finds in a Hugging Face decoder what the engine needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from torch import nn

from methods.base import Shape
from methods.engine.decoder.families import UnsupportedModel, require_family

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class LayerParts:
    """The modules of one decoder layer that the engine calls."""

    layer: nn.Module
    attention_norm: nn.Module
    attention: nn.Module
    mlp_norm: nn.Module
    mlp: nn.Module


def decoder(model: PreTrainedModel) -> nn.Module:
    """The stack under the LM head."""
    stack: nn.Module = model.get_decoder()
    return stack


def layers_of(model: PreTrainedModel) -> Sequence[LayerParts]:
    """The decoder layers in execution order.

    Raises:
        UnsupportedModel: the family is unknown or a layer lacks an expected module.
    """
    family = require_family(model.config.model_type)
    found = []
    for layer in cast("nn.ModuleList", decoder(model).layers):
        try:
            found.append(
                LayerParts(
                    layer=layer,
                    attention_norm=getattr(layer, family.attention_norm),
                    attention=getattr(layer, family.attention),
                    mlp_norm=getattr(layer, family.mlp_norm),
                    mlp=getattr(layer, family.mlp),
                )
            )
        except AttributeError as error:
            raise UnsupportedModel(
                f"unexpected layer in {model.config.model_type}: {error}"
            ) from error
    return found


def shape_of(config: PretrainedConfig) -> Shape:
    """Sizes from a Hugging Face config."""
    require_family(config.model_type)
    heads = config.num_attention_heads
    return Shape(
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        mlp_width=config.intermediate_size,
        vocab=config.vocab_size,
    )
