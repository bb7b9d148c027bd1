"""What a forward call of the decoder is about, and what each of its layers was given."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

NO_TOKENS = torch.ones(0, 0, dtype=torch.bool)


@dataclass
class ForwardCall:
    """One forward call of the decoder; made before its layers run, and dropped after."""

    valid_BT: Tensor = NO_TOKENS
    """bool: False for padding."""
    positions_BT: Tensor = NO_TOKENS
    """int64: index of each token among the valid tokens of its sequence."""
    reserved_BT: Tensor | None = None
    """bool: tokens that every routed unit executes; None if there are none in this call."""
    asked_BT: Tensor | None = None
    """bool: the real tokens that are not; None if these are all."""
    past: int | Tensor = 0
    """Tokens that the cache held before this call; a 0-dim tensor while a graph is captured."""
    mask: Any = None
    """The attention mask that the model was given."""
    attentions: bool = False
    """Whether attention maps are asked for."""
    only_padding: bool = True
    """False if a token must not see some real token before it: packed rows, a mask of one's own."""
    threshold: float | None = None
    """The method's threshold on the host, read once a call where a path needs it there."""
    attending: dict[int, Tensor] = field(default_factory=dict)
    """execute_BT of each layer's attention."""
    memory: dict[str, Any] = field(default_factory=dict)
    """What the method keeps from site to site."""
    _padding: tuple[Tensor | None, bool] | None = None

    @classmethod
    def read(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ForwardCall:
        """Read the arguments of the decoder's forward.

        Raises:
            ValueError: an attention mask that does not cover the tokens.
        """
        tokens = args[0] if args else kwargs.get("input_ids")
        tokens = kwargs["inputs_embeds"] if tokens is None else tokens
        mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        cache = kwargs.get("past_key_values")
        past = _tokens_in(cache)
        valid_BT, positions_BT = valid_and_positions(
            mask,
            batch=tokens.shape[0],
            tokens=tokens.shape[1],
            past=past,
            device=tokens.device,
            cache=cache,
            position_ids=kwargs.get("position_ids"),
        )
        packed = mask is None and cache is None and _restarts(kwargs.get("position_ids"))
        if packed:  # several sequences lie in one row, each from position 0
            positions_BT = kwargs["position_ids"].to(tokens.device).expand(valid_BT.shape)
        asked = bool(kwargs.get("output_attentions"))
        simple = mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)
        return cls(
            valid_BT,
            positions_BT,
            past=past,
            mask=mask,
            attentions=asked,
            only_padding=simple and not packed,
        )

    def reserve(self, first: int) -> None:
        """Mark the first tokens of every sequence; none where all of them are in the cache."""
        past = self.mask is None and isinstance(self.past, int) and self.past >= first
        if first and not past:
            self.reserved_BT = (self.positions_BT < first) & self.valid_BT
            self.asked_BT = self.valid_BT & ~self.reserved_BT

    def move(self, device: torch.device) -> None:
        """Bring what layers read to the device of the next one."""
        self.valid_BT, self.positions_BT = self.valid_BT.to(device), self.positions_BT.to(device)
        if self.reserved_BT is not None and self.asked_BT is not None:
            self.reserved_BT, self.asked_BT = self.reserved_BT.to(device), self.asked_BT.to(device)

    def padding(self) -> tuple[Tensor | None, bool]:
        """`leading_padding` of the mask; looked at once a call, and only if a path asks."""
        if self._padding is None:
            self._padding = leading_padding(self.mask)
        return self._padding


@dataclass(slots=True)
class LayerInputs:
    """What a decoder layer was given beside the residual stream."""

    call: ForwardCall
    position_embeddings: tuple[Tensor, Tensor]
    """cos and sin of the rotary positions, [B or 1, T, head_dim]."""
    attention_mask: Tensor | None
    """None (causal), or [B, 1, T, keys], bool or additive."""
    past_key_values: Any
    window: int | None
    """Sliding-window size of this layer's attention, if it has one."""
    softcap: float | None
    """Range that its attention scores are bent to, if they are."""
    others: dict[str, Any]
    """Further keyword arguments, for the attention module itself."""


def valid_and_positions(
    attention_mask: Any,
    *,
    batch: int,
    tokens: int,
    past: int | Tensor,
    device: torch.device,
    cache: Any = None,
    position_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Read which of the current tokens are real, and their place among the real ones.

    Args:
        attention_mask: None, [B, past + T] with nonzero for real tokens, or a prepared
            [B, 1, T, S] mask (or a dict of such): a token is real if it may attend to itself.
        batch: B.
        tokens: T, current tokens only.
        past: tokens already in the cache.
        cache: whose keys a prepared mask is about; a window has dropped the oldest of them.
        position_ids: [B or 1, T], read beside a prepared mask; one with a window does not show how
            many tokens came before.

    Returns:
        valid_BT bool, positions_BT int64 (index among the sequence's real tokens, from 0).

    Raises:
        ValueError: a mask of another shape.
    """
    layer = 0
    if isinstance(attention_mask, dict):
        kind = "full_attention" if "full_attention" in attention_mask else "sliding_attention"
        attention_mask = attention_mask[kind]
        layer = 0 if cache is None else cache.is_sliding.index(kind == "sliding_attention")
    if attention_mask is None:
        positions = (torch.arange(tokens, device=device) + past).expand(batch, tokens)
        return torch.ones(batch, tokens, dtype=torch.bool, device=device), positions
    if not isinstance(attention_mask, Tensor):
        kind = type(attention_mask).__name__
        raise ValueError(f"a routed model reads an attention_mask of [batch, keys], not a {kind}")
    if attention_mask.dim() == 4:
        first = 0 if cache is None else cache.get_mask_sizes(tokens, layer)[1]
        return _from_square(attention_mask, tokens, int(past) - int(first), position_ids)
    if attention_mask.dim() != 2 or attention_mask.shape[1] < tokens:
        shape = tuple(attention_mask.shape)
        raise ValueError(f"attention_mask of shape {shape} does not cover {tokens} tokens")
    real = attention_mask.to(device) != 0
    positions = (real.long().cumsum(1) - 1).clamp_min(0)
    return real[:, -tokens:], positions[:, -tokens:]


def _from_square(
    mask: Tensor, tokens: int, before: int, position_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Read a mask whose keys are `before` past ones and then the current ones."""
    allowed = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
    diagonal = allowed.diagonal(offset=before, dim1=1, dim2=2)[:, :tokens]
    if position_ids is not None:
        return diagonal, position_ids.to(mask.device).expand(diagonal.shape)
    return diagonal, (allowed.long().sum(-1) - 1).clamp_min(0)


def _restarts(position_ids: Tensor | None) -> bool:
    """True if several sequences lie in one row, as transformers tells from their positions."""
    return position_ids is not None and bool((position_ids.diff(dim=-1) != 1).any())


def _tokens_in(cache: Any) -> int | Tensor:
    """Length of a cache: a number, or its own 0-dim tensor while a CUDA graph is captured."""
    length = 0 if cache is None else cache.get_seq_length()
    return length if isinstance(length, Tensor) and capturing() else int(length)


def capturing() -> bool:
    """True while a CUDA graph is captured: nothing may then be read on the host."""
    return bool(torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def leading_padding(attention_mask: Any) -> tuple[Tensor | None, bool]:
    """Count the padding before each sequence, int64 [B] or None, and say whether that tells it all.

    It does if each sequence's real tokens are contiguous, and none of several new tokens follows
    a gap: then the visible keys of a query are one range. One transfer to the host a forward.
    """
    if attention_mask is None:
        return None, True
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        return None, False
    real = attention_mask != 0
    first = (real.cumsum(1) == 0).sum(1)
    end = real.shape[1] - (real.flip(1).cumsum(1) == 0).sum(1)
    whole = (end - first == real.sum(1)) | ~real.any(1)
    return first, bool(whole.all())
