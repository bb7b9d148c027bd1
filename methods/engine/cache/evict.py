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


class _EvictingLayer(DynamicLayer):
    """Stands in a cache for a layer with or without a sliding window.

    Args:
        window: of the layer that it replaces; None looks back over all.
    """

    def __init__(self, window: int | None = None) -> None:
        super().__init__()
        self.window, self.is_sliding = window, window is not None

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset as the replaced layer says them.

        transformers makes the mask of all layers with a window from the first of them, also for
        layers that are not routed and keep their own kind.
        """
        seen = self.get_seq_length()
        first = 0 if self.window is None else max(seen - self.window + 1, 0)
        return seen - first + query_length, first

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: sequence b becomes `beam_idx[b]`."""
        self.batch_select_indices(beam_idx)


class KeptKeys(_EvictingLayer):
    """Keys and values of executed tokens only; sequence b holds `counts[b]` of them, in front."""

    def __init__(self, window: int | None = None) -> None:
        super().__init__(window)
        self.seen = 0
        """Tokens that passed, executed or not: the length that positions and masks go by."""
        self.counts: list[int] = []
        self.places: Tensor | None = None
        """int64 [B, slots]: which token of its sequence (padding included) a key belongs to."""
        self.forgotten = 0
        """Keys of earlier tokens than this one are gone: no query sees them any more."""

    def append(self, key_NKd: Tensor, value_NKd: Tensor, rows: Rows) -> list[int]:
        """Add the executed tokens of a forward; returns how many each sequence held before."""
        self._reserve(rows.counts, key_NKd)
        before = self.counts
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

    def _reserve(self, more: list[int], like_NKd: Tensor) -> None:
        """Make room for more keys in each sequence; what a window hides is dropped before."""
        self.counts = self.counts or [0] * len(more)
        if self.places is None:
            shape = (len(more), like_NKd.shape[1], max(more), like_NKd.shape[2])
            self.keys, self.values = like_NKd.new_zeros(shape), like_NKd.new_zeros(shape)
            self.places = like_NKd.new_zeros(shape[0], shape[2], dtype=torch.long)
            self.dtype, self.device = like_NKd.dtype, like_NKd.device
            self.is_initialized = True
            return
        assert self.keys is not None and self.values is not None
        held = self.places.shape[1]
        if self._longest(more) > held and self.window is not None:
            self._forget(self.seen - self.window + 1)
        slots = self._longest(more)
        if slots > held:
            spare = slots + slots // 8 + SPARE - held
            self.keys = functional.pad(self.keys, (0, 0, 0, spare))
            self.values = functional.pad(self.values, (0, 0, 0, spare))
            self.places = functional.pad(self.places, (0, spare))

    def _longest(self, more: list[int]) -> int:
        return max(a + b for a, b in zip(self.counts, more, strict=True))

    def _held(self) -> Tensor:
        """bool [B, slots]: slots in use."""
        assert self.places is not None
        slots = torch.arange(self.places.shape[1], device=self.places.device)
        return slots < torch.tensor(self.counts, device=slots.device)[:, None]

    def _forget(self, first: int) -> None:
        """Drop the keys of tokens before this one; the later ones move to the front."""
        assert self.keys is not None and self.values is not None and self.places is not None
        gone_B = (self._held() & (self.places < first)).sum(1)
        last = self.places.shape[1] - 1
        index = (torch.arange(last + 1, device=gone_B.device) + gone_B[:, None]).clamp_max(last)
        self.places, index = self.places.gather(1, index), index[:, None, :, None]
        self.keys = torch.take_along_dim(self.keys, index, 2)
        self.values = torch.take_along_dim(self.values, index, 2)
        self.counts = [a - b for a, b in zip(self.counts, gone_B.tolist(), strict=True)]
        self.forgotten = max(self.forgotten, first)

    def in_sight(self, execute_BT: Tensor, window: int | None) -> Tensor:
        """int64 [B, T]: keys that the query of each of the next tokens sees, were it executed."""
        tokens = execute_BT.shape[1]
        if window is None or self.seen + tokens <= window:
            held = torch.tensor(self.counts or [0], device=execute_BT.device)
            return held[:, None] + keys_in_sight(execute_BT, tokens, None)
        flags_BS = execute_BT.new_zeros(len(execute_BT), self.seen + tokens)
        flags_BS[:, self.seen :] = execute_BT
        if self.places is not None:
            owner, slot = self._held().nonzero(as_tuple=True)
            flags_BS[owner, self.places[owner, slot]] = True
        return keys_in_sight(flags_BS, tokens, window)

    def get_seq_length(self) -> int:
        """Tokens that passed, as the rest of transformers understands a cache's length."""
        return self.seen

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
        """Forget the last tokens, given as a negative number.

        Raises:
            ValueError: a positive number, or the window has dropped keys that would be seen again.
        """
        left = max(0, self.seen + tokens_to_remove)
        if tokens_to_remove > 0:
            raise ValueError("crop takes minus the number of tokens to remove")
        if self.window is not None and max(left - self.window + 1, 0) < self.forgotten:
            raise ValueError("the sliding window has dropped keys that this crop needs")
        self.seen = left
        if tokens_to_remove and self.places is not None:
            self.counts = (self._held() & (self.places < left)).sum(1).tolist()

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.seen, self.counts, self.places, self.forgotten = 0, [], None, 0


class FlaggedKeys(_EvictingLayer):
    """Keys and values of every token, and whether the token was executed: the reference."""

    kept_BS: Tensor | None = None

    def note(self, execute_BT: Tensor) -> Tensor:
        """Flags of the tokens whose keys come next; returns those of all tokens, bool [B, S]."""
        flags = [execute_BT] if self.kept_BS is None else [self.kept_BS, execute_BT]
        self.kept_BS = torch.cat(flags, dim=1)
        return self.kept_BS

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
    """Return the cache's layer, replaced by one of `kind` while it is empty.

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
    cache.layers[index] = made = kind(getattr(layer, "sliding_window", None))
    return made


def visible(
    kept_BS: Tensor, like: Tensor | None, *, past: int, tokens: int, window: int | None
) -> Tensor:
    """Make the attention mask under `evict`, [B, 1, T, S]: a query sees kept keys, and its own.

    Its own key stands in for the sake of bypassed queries, whose output nobody reads: an empty
    row would be not a number. Padding is never kept.

    Args:
        kept_BS: bool, keys of executed tokens.
        like: the model's own mask; one of scores makes this one of scores.
    """
    keys_S = torch.arange(kept_BS.shape[1], device=kept_BS.device)
    own_T1 = (past + torch.arange(tokens, device=keys_S.device))[:, None]
    near_TS = keys_S <= own_T1
    if window is not None:
        near_TS = near_TS & (keys_S > own_T1 - window)
    seen = (kept_BS[:, None, None] & near_TS) | (keys_S == own_T1)
    if like is None or like.dtype == torch.bool:
        return seen
    return like.new_zeros(seen.shape).masked_fill(~seen, torch.finfo(like.dtype).min)


def keys_in_sight(kept_BS: Tensor, tokens: int, window: int | None) -> Tensor:
    """int64 [B, T]: kept keys that each of the last tokens sees, its own included."""
    seen_BS = kept_BS.long().cumsum(1)
    if window is not None:
        seen_BS = seen_BS - functional.pad(seen_BS, (window, 0))[:, : kept_BS.shape[1]]
    return seen_BS[:, -tokens:]
