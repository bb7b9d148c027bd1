"""What one forward call of the model is about, read before its layers run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from methods.engine.decoder.padding import leading_padding, tokens_in, valid_and_positions


@dataclass
class ForwardState:
    """What one forward call of the model is about; set by a hook before the layers run."""

    valid_BT: Tensor | None = None
    positions_BT: Tensor | None = None
    past: int | Tensor = 0
    """Tokens that the cache held before this forward; a 0-dim tensor while a graph is captured."""
    mask: Any = None
    """The attention mask that the model was given."""
    _padding: tuple[Tensor | None, bool] | None = None
    threshold: float | None = None
    """The method's threshold on the host, read once a forward where a path needs it there."""
    memory: dict[str, Any] = field(default_factory=dict)
    """What the method keeps from site to site of this forward; each starts with an empty one."""

    def move(self, device: torch.device) -> None:
        """Bring what layers read to the device of the next one."""
        if self.valid_BT is not None and self.valid_BT.device != device:
            assert self.positions_BT is not None
            self.valid_BT, self.positions_BT = (
                self.valid_BT.to(device),
                self.positions_BT.to(device),
            )

    def padding(self) -> tuple[Tensor | None, bool]:
        """`leading_padding` of the mask; looked at once a forward, and only if a path asks."""
        if self._padding is None:
            self._padding = leading_padding(self.mask)
        return self._padding


def read_inputs(state: ForwardState, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Fill the state from the arguments of the decoder's forward."""
    tokens = args[0] if args else kwargs.get("input_ids")
    if tokens is None:
        tokens = kwargs["inputs_embeds"]
    cache = kwargs.get("past_key_values")
    state.threshold = state._padding = None
    state.memory = {}
    mask = state.mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
    state.past = 0 if cache is None else tokens_in(cache)
    state.valid_BT, state.positions_BT = valid_and_positions(
        mask,
        batch=tokens.shape[0],
        tokens=tokens.shape[1],
        past=state.past,
        device=tokens.device,
    )
