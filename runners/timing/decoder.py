"""Decoding from a real cache, again and again from the same place."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from methods.engine.cache.growing import allocated_bytes, cache_bytes, roomy_cache
from methods.engine.measure.graphs import WARMUP_STEPS, DecodeGraph, static_cache


class Decoder:
    """A cache filled with the first `context` tokens of each row; `run` decodes the next ones.

    Built inside a `routed` block it is the routed model's, and must run inside one.

    Args:
        ids_BT: int64, on the model's device.
        graphs: replay a CUDA graph of one step, over a static cache.
    """

    def __init__(
        self, model: PreTrainedModel, ids_BT: Tensor, context: int, *, graphs: bool
    ) -> None:
        self.model, self.ids_BT, self.context = model, ids_BT, context
        batch, room = ids_BT.shape[0], ids_BT.shape[1] + WARMUP_STEPS
        self.cache: Any = roomy_cache(model)
        if graphs:
            self.cache = static_cache(model, batch=batch, tokens=room)
        model(input_ids=ids_BT[:, :context], past_key_values=self.cache, logits_to_keep=1)
        self.cache_bytes = cache_bytes(self.cache)
        self.cache_allocated_bytes = allocated_bytes(self.cache)
        self.graph = DecodeGraph(model, self.cache, batch=batch) if graphs else None

    def run(self, steps: int, *, graph: bool = True) -> None:
        """Decode the tokens after the context, one forward each, and forget them again."""
        replayed = self.graph if graph else None
        for place in range(self.context, self.context + steps):
            token_B1 = self.ids_BT[:, place : place + 1]
            if replayed is None:
                self.model(input_ids=token_B1, past_key_values=self.cache)
            else:
                replayed(token_B1)
        if self.graph is None:
            self.cache.crop(-steps)
        else:
            self.graph.rewind(self.context)
