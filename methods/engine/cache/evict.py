"""KV policy `evict` (D-LLM): a bypassed token leaves no key and no value, and nobody attends to it.

Two layers for a Hugging Face dynamic cache. `KeptKeys` is the real one: compact, only executed
tokens in it. `FlaggedKeys` serves the masked path, the reference: every token is in it, with a
flag. Both follow beam search, batch selection and cropping as any cache layer does.

Shapes: B sequences, S keys, K key-value heads, d head size, N executed tokens of a forward.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import DynamicLayer

from methods.engine.ops.rows import Rows

SPARE = 16
"""Slots that a full compact layer grows by, beside an eighth of its size."""


class KeptKeys(DynamicLayer):
    """Keys and values of executed tokens only; sequence b holds `counts[b]` of them, in front."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        """Tokens that passed, executed or not: the length that positions and masks go by."""
        self.counts: list[int] = []
        self.places: Tensor | None = None
        """int64 [B, slots]: which token of its sequence (padding included) a key belongs to."""

    def append(self, key_NKd: Tensor, value_NKd: Tensor, rows: Rows) -> list[int]:
        """Add the executed tokens of a forward; returns how many each sequence held before."""
        before = self.counts or [0] * len(rows.counts)
        longest = max(a + b for a, b in zip(before, rows.counts, strict=True))
        self._reserve(longest, len(before), key_NKd)
        assert self.keys is not None and self.values is not None and self.places is not None
        owner = rows.index_N // rows.tokens
        starts = torch.tensor([0, *rows.counts[:-1]]).cumsum(0)
        shift = (torch.tensor(before) - starts).to(owner.device)
        slot = torch.arange(len(owner), device=owner.device) + shift[owner]
        self.keys[owner, :, slot] = key_NKd
        self.values[owner, :, slot] = value_NKd
        self.places[owner, slot] = self.seen + rows.index_N % rows.tokens
        self.counts = [a + b for a, b in zip(before, rows.counts, strict=True)]
        self.seen += rows.tokens
        return before

    def skip(self, rows: Rows) -> None:
        """A forward that executes no token."""
        self.counts = self.counts or [0] * len(rows.counts)
        self.seen += rows.tokens

    def _reserve(self, slots: int, batch: int, like_NKd: Tensor) -> None:
        held = 0 if self.keys is None else self.keys.shape[2]
        if self.keys is not None and slots <= held:
            return
        grown = slots if self.keys is None else slots + slots // 8 + SPARE
        if self.keys is None:
            shape = (batch, like_NKd.shape[1], grown, like_NKd.shape[2])
            self.keys, self.values = like_NKd.new_zeros(shape), like_NKd.new_zeros(shape)
            self.places = torch.zeros(batch, grown, dtype=torch.long, device=like_NKd.device)
            self.dtype, self.device = like_NKd.dtype, like_NKd.device
            self.is_initialized = True
            return
        assert self.values is not None and self.places is not None
        more = grown - held
        self.keys = functional.pad(self.keys, (0, 0, 0, more))
        self.values = functional.pad(self.values, (0, 0, 0, more))
        self.places = functional.pad(self.places, (0, more))

    def get_seq_length(self) -> int:
        """Tokens that passed, as the rest of transformers understands a cache's length."""
        return self.seen

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: sequence b becomes `beam_idx[b]`."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences."""
        if self.counts:
            self.counts = [self.counts[b] for b in indices.tolist()]
        if self.keys is None or self.values is None or self.places is None:
            return
        chosen = indices.to(self.keys.device)
        self.keys, self.values = self.keys[chosen], self.values[chosen]
        self.places = self.places[chosen]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence `repeats` times."""
        self.batch_select_indices(torch.arange(len(self.counts)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, given as a negative number."""
        if tokens_to_remove > 0:
            raise ValueError("crop takes minus the number of tokens to remove")
        self.seen = max(0, self.seen + tokens_to_remove)
        if not tokens_to_remove or self.places is None:
            return
        slots = torch.arange(self.places.shape[1], device=self.places.device)
        held = slots < torch.tensor(self.counts, device=slots.device)[:, None]
        self.counts = (held & (self.places < self.seen)).sum(1).tolist()

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.seen, self.counts, self.places = 0, [], None


class FlaggedKeys(DynamicLayer):
    """Keys and values of every token, and whether the token was executed: the reference."""

    def __init__(self) -> None:
        super().__init__()
        self.kept_BS: Tensor | None = None

    def note(self, execute_BT: Tensor) -> Tensor:
        """Flags of the tokens whose keys come next; returns those of all tokens, bool [B, S]."""
        flags = [execute_BT] if self.kept_BS is None else [self.kept_BS, execute_BT]
        self.kept_BS = torch.cat(flags, dim=1)
        return self.kept_BS

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: sequence b becomes `beam_idx[b]`."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences."""
        super().batch_select_indices(indices)
        if self.kept_BS is not None:
            self.kept_BS = self.kept_BS[indices.to(self.kept_BS.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence `repeats` times."""
        super().batch_repeat_interleave(repeats)
        if self.kept_BS is not None:
            self.kept_BS = self.kept_BS.repeat_interleave(repeats, dim=0)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, given as a negative number."""
        super().crop(tokens_to_remove)
        if tokens_to_remove and self.kept_BS is not None:
            self.kept_BS = self.kept_BS[:, : -abs(tokens_to_remove)]

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.kept_BS = None


L = TypeVar("L", KeptKeys, FlaggedKeys)


def layer_of(cache: Any, index: int, kind: type[L]) -> L:
    """The cache's layer, replaced by one of `kind` while it is empty.

    Raises:
        ValueError: the cache is not a dynamic one, or holds keys that were not written under
            `evict` (or under the other mode).
    """
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) <= index:
            cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[index]
    if isinstance(layer, kind):
        return layer
    if not isinstance(layer, DynamicLayer) or layer.get_seq_length():
        raise ValueError("KV policy evict needs an empty dynamic cache to begin with")
    cache.layers[index] = kind()
    return cache.layers[index]  # type: ignore[no-any-return]


def visible(kept_BS: Tensor, mask: Tensor | None, *, past: int, tokens: int) -> Tensor:
    """Attention mask under `evict`, [B, 1, T, S]: a query sees kept keys, and its own.

    Its own key stands in for the sake of bypassed queries, whose output nobody reads: an empty
    row would be not a number.

    Args:
        kept_BS: bool, keys of executed tokens.
        mask: the model's, bool or additive [B, 1, T, S]; None means causal.
    """
    keys = torch.arange(kept_BS.shape[1], device=kept_BS.device)
    own_TS = keys == (past + torch.arange(tokens, device=keys.device))[:, None]
    seen = kept_BS[:, None, None] | own_TS
    if mask is None:
        return seen & (keys <= (past + torch.arange(tokens, device=keys.device))[:, None])
    if mask.dim() != 4:
        raise ValueError("KV policy evict needs attn_implementation sdpa or eager")
    if mask.dtype == torch.bool:
        return (mask & seen) | own_TS
    return mask.masked_fill(~seen, torch.finfo(mask.dtype).min).masked_fill(own_TS, 0.0)
