"""One decoding step as a CUDA graph: a replay costs the host one launch for the whole model.

Works for the dense model and, through the fused kernels, for a routed one: both decide, execute
and bypass on the device. Needs a static cache, whose buffers and length live there too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import StaticCache

from methods.engine.decoder.families import windows_of
from methods.engine.decoder.placement import placed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WARMUP_STEPS = 3
"""Ordinary steps before the capture, which compile and tune the kernels."""


def static_cache(model: PreTrainedModel, *, batch: int, tokens: int) -> StaticCache:
    """Make an empty cache for `tokens` tokens of `batch` sequences.

    Raises:
        ValueError: a sliding window is shorter, whose length a graph cannot follow.
    """
    if any(window is not None and window < tokens for window in windows_of(model.config)):
        raise ValueError(
            f"a CUDA graph cannot follow a sliding window over {tokens} tokens: "
            "set speed.graphs=false"
        )
    cache = StaticCache(config=model.config, max_cache_len=tokens)
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache.early_initialization(batch, heads, size, model.dtype, model.device)
    return cache


class DecodeGraph:
    """Captured at the cache's present length; every call decodes one token of each sequence.

    The capture happens inside the `routed` block that it belongs to, if any.

    Args:
        model: on CUDA, in evaluation mode.
        cache: of `static_cache`, filled by a prefill; keeps room for `WARMUP_STEPS` more.

    Raises:
        ValueError: not on a CUDA device, or not all of it.
    """

    def __init__(self, model: PreTrainedModel, cache: StaticCache, *, batch: int) -> None:
        if placed(model) or model.device.type != "cuda":
            raise ValueError("a CUDA graph needs a whole model on CUDA; set speed.graphs=false")
        self.model, self.cache = model, cache
        self.ids_B1 = torch.zeros(batch, 1, dtype=torch.long, device=model.device)
        start = int(cache.get_seq_length())
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), torch.cuda.stream(stream):
            for _ in range(WARMUP_STEPS):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(self.graph):
            self.logits_B1V = self._step()
        self.rewind(start)

    def __call__(self, ids_B1: Tensor) -> Tensor:
        """Logits [B, 1, V] of the next token; overwritten by the next call."""
        self.ids_B1.copy_(ids_B1)
        self.graph.replay()
        return self.logits_B1V

    def rewind(self, tokens: int) -> None:
        """Take the cache back to this length."""
        for layer in self.cache.layers:
            set_length(layer, tokens)

    def _step(self) -> Tensor:
        logits: Tensor = self.model(input_ids=self.ids_B1, past_key_values=self.cache).logits
        return logits


def set_length(layer: Any, tokens: int) -> None:
    """Set the length of a layer of a static cache; its keys beyond are never read."""
    if hasattr(layer, "cumulative_length_int"):  # a window that the text never fills
        layer.cumulative_length_int = tokens
    length = layer.cumulative_length
    if isinstance(length, Tensor):
        length.fill_(tokens)
    else:
        layer.cumulative_length = tokens
