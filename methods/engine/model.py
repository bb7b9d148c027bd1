"""A causal LM, its tokenizer and a routing method as one object, for a notebook."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from methods.base import Method
from methods.engine.checkpoint import hash_model, save_pretrained
from methods.engine.decoder.placement import input_device
from methods.engine.measure.counters import Usage
from methods.engine.routed import Mode, attach, routed
from methods.engine.routing import routing_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class RoutedModel:
    """Routes a Hugging Face causal LM in each of its calls; outside them the LM is untouched.

    Args:
        model: of a supported family; several methods may share it.
        tokenizer: its own.
        method: attached to the model here if it is not yet.
        mode: `gathered` computes what is executed; `masked` computes everything and blends.
        origin: `target`, `options` and `base` of `save_pretrained`, which `save` needs; a `base`
            of None is read off the model.

    Attributes:
        usage: what the last call executed, as `sparsity 0.503 (attention 0.44, ...)`; None before.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        method: Method,
        *,
        mode: Mode = "gathered",
        origin: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.tokenizer, self.mode = model, tokenizer, mode
        self.method = attach(model, method).eval() if method.shape is None else method
        self.origin = origin
        self.usage: Usage | None = None

    @contextmanager
    def routed(self) -> Iterator[Any]:
        """Yield the Hugging Face model, routed inside the block: for anything that takes one."""
        with routed(self.model, self.method, self.mode) as model:
            try:
                yield model
            finally:
                self.usage = routing_of(model).counters.read()

    @torch.no_grad()
    def generate(
        self, text: str | Sequence[str] | None = None, *, max_new_tokens: int = 64, **options: Any
    ) -> Any:
        """Continue texts, or rows of token ids, with the routed model.

        Args:
            text: one or several, of any lengths; None hands all options to Hugging Face's
                `generate`, `input_ids` among them.
            options: of Hugging Face's `generate` (`do_sample`, `num_beams`, ...).

        Returns:
            What follows the text, or a list of that for several; token ids without `text`.
        """
        options["max_new_tokens"] = max_new_tokens
        with self.routed() as model:
            if text is None:
                return model.generate(**options)
            ids, mask = self._padded([text] if isinstance(text, str) else text)
            out = model.generate(input_ids=ids, attention_mask=mask, **options)[:, ids.shape[1] :]
        said: list[str] = self.tokenizer.batch_decode(out, skip_special_tokens=True)
        return said[0] if isinstance(text, str) else said

    def _padded(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids and mask, int64 [B, T], padded on the left; many tokenizers have no pad."""
        rows = [torch.tensor(self.tokenizer(text)["input_ids"]) for text in texts]
        pad = self.tokenizer.pad_token_id or 0
        side: Any = {"batch_first": True, "padding_side": "left"}
        ids = pad_sequence(rows, padding_value=pad, **side)
        mask = pad_sequence([torch.ones_like(row) for row in rows], **side)
        place = input_device(self.model)
        return ids.to(place), mask.to(place)

    @torch.no_grad()
    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """Run one forward call of the routed model; arguments and outputs are Hugging Face's."""
        with self.routed() as model:
            return model(*inputs, **options)

    def save(self, folder: Path | str) -> Path:
        """Write what was added to the model, as `runners.api.load` reads it.

        Raises:
            ValueError: the object was made without `origin`: nobody knows the method's options.
        """
        if self.origin is None:
            raise ValueError("origin is missing: its method's target and options are not known")
        base = self.origin.get("base") or self._base()
        return save_pretrained(self.method, folder, **{**self.origin, "base": base})

    def _base(self) -> dict[str, Any]:
        path = str(self.model.config.name_or_path)
        return {
            "name": path,
            "source": "pretrained",
            "path": str(Path(path).resolve()) if Path(path).is_dir() else path,
            "revision": getattr(self.model.config, "_commit_hash", None),
            "seed": 0,
            "weights_sha256": hash_model(self.model),
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }

    def __repr__(self) -> str:
        asked = f"{type(self.method).__name__}(sparsity={self.method.sparsity:g})"
        used = "" if self.usage is None else f", last call: {self.usage}"
        return f"RoutedModel({type(self.model).__name__}, {asked}, {self.mode}{used})"
