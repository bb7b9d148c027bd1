"""Model families that the engine can route; one entry per family, read without loading torch."""

from __future__ import annotations

from dataclasses import dataclass


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
    """Adapter of a family by `config.model_type`.

    Raises:
        UnsupportedModel: no adapter.
    """
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise UnsupportedModel(
            f"no adapter for model family {model_type!r}; known: {known} "
            "(one line in methods/engine/decoder/families.py adds a pre-norm family)"
        )
    return FAMILIES[model_type]
