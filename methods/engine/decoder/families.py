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
    """Attribute names inside one decoder layer.

    The layer must compute h + m * after(attention(norm(h))) and then the same with its MLP, nothing
    else, where m is 1 and `after` nothing but in the families that name them. `attach` compares a
    forward with the untouched model.
    """

    attention_norm: str | None = "input_layernorm"
    """None: the sublayer reads the residual stream itself."""
    attention: str = "self_attn"
    attention_after: str | None = None
    """Norm of what the sublayer gives."""
    mlp_norm: str | None = "post_attention_layernorm"
    mlp: str = "mlp"
    mlp_after: str | None = None
    multiplier: str | None = None
    """Attribute of the layer that what a sublayer adds is multiplied with."""
    fused: tuple[tuple[str, str], ...] = ()
    """Roles of several projections and the one linear map that has them all."""
    capped: bool = False
    """Whether attention scores are bent to a range, `attention.attn_logit_softcapping`."""
    mlp_width: str = "intermediate_size"
    """Of the config: neurons of the MLP, or of one expert where a token reads several."""
    experts: bool = False
    """Whether the MLP of most layers is `num_experts_per_tok` experts of many."""
    windows: Literal["none", "all", "by type"] = "none"
    """Layers whose attention looks back over `config.sliding_window` tokens only: all of them, or
    those that `config.layer_types` names."""

    def projection(self, role: str) -> str:
        """Name of the linear map `q`, `k`, `v`, `o`, `gate`, `up` or `down`."""
        return dict(self.fused).get(role, f"{role}_proj")


_PHI3 = (*((role, "qkv_proj") for role in "qkv"), ("gate", "gate_up_proj"), ("up", "gate_up_proj"))
_GEMMA = Family(
    attention_after="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_after="post_feedforward_layernorm",
    windows="by type",
)
FAMILIES: dict[str, Family] = {
    "gemma2": replace(_GEMMA, capped=True),
    "gemma3_text": _GEMMA,
    "granite": Family(multiplier="residual_multiplier"),
    "llama": Family(),
    "mistral": Family(windows="all"),
    "mixtral": Family(windows="all", experts=True),
    "olmo2": Family(
        attention_norm=None,
        attention_after="post_attention_layernorm",
        mlp_norm=None,
        mlp_after="post_feedforward_layernorm",
    ),
    "phi3": Family(fused=_PHI3, windows="all"),
    "qwen2": Family(windows="by type"),
    "qwen3": Family(windows="by type"),
    "qwen3_moe": Family(windows="all", mlp_width="moe_intermediate_size", experts=True),
    "smollm3": Family(windows="by type"),
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
            "(one line in methods/engine/decoder/families.py adds one)"
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
    attention_after: nn.Module | None = None
    """Norm of what the attention gives, and below of the MLP."""
    mlp_after: nn.Module | None = None
    multiplier: float = 1.0
    """Of what each of the two adds."""
    softcap: float | None = None
    """Attention scores s become cap * tanh(s / cap)."""
    window: int | None = None
    """Tokens that its attention looks back over, its own included; None: all."""
    first_of_kind: bool = False
    """True for the first layer with a window, and for the first without."""

    @property
    def adds_as_is(self) -> bool:
        """True if the residual stream gets what the two sublayers give, nothing in between."""
        return self.attention_after is None and self.mlp_after is None and self.multiplier == 1.0


def decoder(model: PreTrainedModel) -> nn.Module:
    """Return the stack under the LM head."""
    stack: nn.Module = model.get_decoder()
    return stack


def layers_of(model: PreTrainedModel) -> Sequence[LayerParts]:
    """List the decoder layers in execution order.

    Raises:
        UnsupportedModel: the family is unknown or a layer lacks an expected module.
    """
    from torch import nn

    family = require_family(model.config.model_type)
    layers: Any = decoder(model).layers
    windows = windows_of(model.config)

    def parts_of(index: int, layer: Any) -> LayerParts:
        def named(name: str | None) -> Any:
            return None if name is None else getattr(layer, name)

        attention = named(family.attention)
        return LayerParts(
            layer=layer,
            attention_norm=named(family.attention_norm) or nn.Identity(),
            attention=attention,
            mlp_norm=named(family.mlp_norm) or nn.Identity(),
            mlp=named(family.mlp),
            attention_after=named(family.attention_after),
            mlp_after=named(family.mlp_after),
            multiplier=1.0 if family.multiplier is None else float(named(family.multiplier)),
            softcap=attention.attn_logit_softcapping if family.capped else None,
            window=windows[index],
            first_of_kind=windows.index(windows[index]) == index,
        )

    try:
        return [parts_of(index, layer) for index, layer in enumerate(layers)]
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
    """Read the sizes of a model from its Hugging Face config.

    Where an MLP has experts, its width is that of the ones that a token reads.
    """
    from methods.base import Shape  # loads torch

    family = require_family(config.model_type)
    width = getattr(config, family.mlp_width)
    heads = config.num_attention_heads
    return Shape(
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        mlp_width=width * config.num_experts_per_tok if family.experts else width,
        vocab=config.vocab_size,
    )
