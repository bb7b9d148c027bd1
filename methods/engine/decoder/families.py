"""Model families that the engine can route: the modules of a layer, sizes and windows.

Loads no torch: a command line is checked against the families before any model is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

    from methods.base import Shape


@dataclass(frozen=True)
class Family:
    """Attribute names inside one decoder layer of a pre-norm family.

    The layer must compute h + attention(norm(h)) and then h + mlp(norm(h)), nothing else.
    """

    attention_norm: str = "input_layernorm"
    attention: str = "self_attn"
    mlp_norm: str = "post_attention_layernorm"
    mlp: str = "mlp"
    projection: str = "{}_proj"
    """Name of the linear map `q`, `k`, `v`, `o`, `gate`, `up` or `down`."""


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
}


class UnsupportedModel(ValueError):
    """The model's family has no adapter; the message lists the known ones."""


def require_family(model_type: str) -> Family:
    """Look a family up by `config.model_type`.

    Raises:
        UnsupportedModel: it is not among `FAMILIES`.
    """
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise UnsupportedModel(
            f"no adapter for model family {model_type!r}; known: {known} "
            "(one line in methods/engine/decoder/families.py adds a pre-norm family)"
        )
    return FAMILIES[model_type]


@dataclass(frozen=True)
class LayerParts:
    """The modules of one decoder layer that the engine calls."""

    layer: nn.Module
    attention_norm: nn.Module
    attention: nn.Module
    mlp_norm: nn.Module
    mlp: nn.Module


def decoder(model: PreTrainedModel) -> nn.Module:
    """Return the stack under the LM head."""
    stack: nn.Module = model.get_decoder()
    return stack


def layers_of(model: PreTrainedModel) -> Sequence[LayerParts]:
    """List the decoder layers in execution order.

    Raises:
        UnsupportedModel: the family is unknown or a layer lacks an expected module.
    """
    family = require_family(model.config.model_type)
    names = (family.attention_norm, family.attention, family.mlp_norm, family.mlp)
    layers: Any = decoder(model).layers
    try:
        return [LayerParts(layer, *(getattr(layer, name) for name in names)) for layer in layers]
    except AttributeError as error:
        raise UnsupportedModel(f"unexpected layer in {model.config.model_type}: {error}") from error


def shape_of(config: PretrainedConfig) -> Shape:
    """Read the sizes of a model from its Hugging Face config."""
    from methods.base import Shape  # loads torch

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
