"""Model families that the engine can route: the modules of a layer, sizes and windows.

Loads no torch: a command line is checked against the families before any model is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

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
    windows: Literal["none", "all", "by type"] = "none"
    """Layers whose attention looks back over `config.sliding_window` tokens only: all of them, or
    those that `config.layer_types` names."""


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(windows="all"),
    "qwen2": Family(windows="by type"),
    "qwen3": Family(windows="by type"),
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
    window: int | None = None
    """Tokens that its attention looks back over, its own included; None: all."""
    first_of_kind: bool = False
    """True for the first layer with a window, and for the first without."""


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
    windows, found = windows_of(model.config), []
    try:
        for index, (layer, window) in enumerate(zip(layers, windows, strict=True)):
            parts = LayerParts(layer, *(getattr(layer, name) for name in names))
            first = windows.index(window) == index
            found.append(replace(parts, window=window, first_of_kind=first))
        return found
    except AttributeError as error:
        raise UnsupportedModel(f"unexpected layer in {model.config.model_type}: {error}") from error


def windows_of(config: PretrainedConfig) -> tuple[int | None, ...]:
    """Read the sliding window of each layer's attention, in tokens; None looks back over all."""
    kind = require_family(config.model_type).windows
    window = getattr(config, "sliding_window", None)
    every = ("sliding_attention" if kind == "all" else "full_attention",) * config.num_hidden_layers
    types = config.layer_types if kind == "by type" else every
    return tuple(window if name == "sliding_attention" else None for name in types)


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
