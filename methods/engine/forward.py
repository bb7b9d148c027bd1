"""What one forward call of the model is about, read before its layers run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from methods.engine.padding import leading_padding, tokens_in, valid_and_positions


@dataclass
class ForwardState:
    """What one forward call of the model is about; set by a hook before the layers run."""

    valid_BT: Tensor | None = None
    positions_BT: Tensor | None = None
    past: int | Tensor = 0
    """Tokens that the cache held before this forward; a 0-dim tensor while a graph is captured."""
    first_valid_B: Tensor | None = None
    """int64: leading padding slots of each sequence; None if there is no mask."""
    contiguous: bool = True
    """False if padding stands between real tokens, or behind those of the cache."""
    threshold: float | None = None
    """The method's threshold on the host, read once a forward where a path needs it there."""


def read_inputs(state: ForwardState, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Fill the state from the arguments of the decoder's forward."""
    tokens = args[0] if args else kwargs.get("input_ids")
    if tokens is None:
        tokens = kwargs["inputs_embeds"]
    cache = kwargs.get("past_key_values")
    state.threshold = None
    mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
    state.past = 0 if cache is None else tokens_in(cache)
    state.first_valid_B, state.contiguous = leading_padding(mask, tokens.shape[1])
    state.valid_BT, state.positions_BT = valid_and_positions(
        mask,
        batch=tokens.shape[0],
        tokens=tokens.shape[1],
        past=state.past,
        device=tokens.device,
    )
