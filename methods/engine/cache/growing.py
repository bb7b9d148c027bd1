"""A dynamic cache that grows in place, and what a cache weighs.

Hugging Face's dynamic cache joins old and new keys anew at every token, a copy of the whole cache
per decoded token that dense and routed models pay alike and that hides what routing saves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SLOTS = 256
"""Slots that a full layer grows by."""


class PreallocatedLayer(DynamicLayer):
    """Keys and values [B, K, S, d], views of larger buffers that are written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.buffers: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append; returns all keys and values."""
        slots = self.extend(key_states)
        for slot, new in zip(slots, (key_states, value_states), strict=True):
            slot.copy_(new)
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def extend(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Slots for more keys and values, [B, K, T, d] as `like`, which are held from now on."""
        if not self.is_initialized:
            self.lazy_initialization(like, like)
        held, tokens = self.get_seq_length(), like.shape[2]
        buffers = self._reserve(like, held + tokens, held)
        self.keys, self.values = (buffer.narrow(2, 0, held + tokens) for buffer in buffers)
        key, value = (buffer.narrow(2, held, tokens) for buffer in buffers)
        return key, value

    def _reserve(self, like: Tensor, total: int, held: int) -> tuple[Tensor, Tensor]:
        """Buffers of at least `total` slots that begin with what is held."""
        own = self.buffers
        fits = own is not None and own[0].shape[2] >= total and _is_view(self.keys, own[0])
        if own is None or not fits:
            batch, heads, _, size = like.shape
            new = [like.new_empty(batch, heads, total + SLOTS, size) for _ in range(2)]
            for buffer, old in zip(new, (self.keys, self.values), strict=True):
                if held and old is not None:
                    buffer[:, :, :held] = old
            own = self.buffers = (new[0], new[1])
        return own

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.buffers = None


def _is_view(keys: Tensor | None, buffer: Tensor) -> bool:
    """False once beam search or selection has replaced the keys by a copy."""
    return keys is None or not keys.numel() or keys.data_ptr() == buffer.data_ptr()


def held_layer(cache: Any, index: int) -> Any:
    """The cache's layer; None without a cache, or before it has that layer."""
    return None if cache is None or len(cache.layers) <= index else cache.layers[index]


def preallocated_cache(model: PreTrainedModel) -> DynamicCache:
    """An empty cache for `model` whose full-attention layers grow in place."""
    cache = DynamicCache(config=model.config)
    cache.layers = [
        PreallocatedLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values that a cache holds, spare slots not counted."""
    return sum(_layer_bytes(layer) for layer in cache.layers if layer.keys is not None)


def _layer_bytes(layer: Any) -> int:
    batch, heads, slots, size = layer.keys.shape
    counts: list[int] = getattr(layer, "counts", None) or [slots] * batch
    return 2 * sum(counts) * heads * size * int(layer.keys.element_size())


def allocated_bytes(cache: Any) -> int:
    """The same with spare slots."""
    total = 0
    for layer in cache.layers:
        held = getattr(layer, "buffers", None) or (layer.keys, layer.values)
        total += sum(t.numel() * t.element_size() for t in held if isinstance(t, torch.Tensor))
    return total
