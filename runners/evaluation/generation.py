"""What the routed model writes, beside the dense one: greedy decoding through the KV cache.

The dense model continues each prompt greedily. The routed one is led along that continuation, token
by token, and at each position says what it would have written. Two figures of one prompt follow:

- `kept`, the main one: the share of positions where that is the dense model's token. Each position
  is judged with the same text before it, so that the first other word is one word and not all.
- `prefix`: the share before the first other token, which is how far the routed model, left to
  itself, writes the same. It is near 0 for most methods, and tells the bad ones little apart.

Shapes: B prompts, N new tokens, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from methods.base import Method
from methods.engine.decoder.placement import input_device
from methods.engine.routed import Mode, routed
from methods.engine.routing import routing_of
from runners.base_model.load import Base
from runners.corpus.source import Document
from runners.evaluation.perplexity import first_tokens
from runners.runtime.memory import Fitting
from runners.runtime.progress import Bar

if TYPE_CHECKING:
    from runners.point_config import ContinuationConfig

PAGE = 16
"""Times the tokens of a prompt: the first tokens of a document, of whose middle it is."""
Row = tuple[Sequence[int], Sequence[int] | None]
"""Token ids of a prompt, and of the continuation that it is led along; None: it writes freely."""


def continuations(
    settings: ContinuationConfig, base: Base, documents: Sequence[Document]
) -> dict[str, Any]:
    """Continue prompts from test text, and those of the gallery, with the dense model.

    Returns:
        `prompts`: ids of each document's, `tokens`: of its continuation; `gallery`: ids of each
        continuation there.
    """
    found = (_prompt(settings, base, document) for document in documents)
    prompts = list(itertools.islice(filter(None, found), settings.prompts))
    rows = [*((ids, None) for ids in prompts), *_gallery(settings, base)]
    written = _write(base.model, rows, settings.new_tokens)
    count = len(prompts)
    return {"prompts": prompts, "tokens": written[:count], "gallery": written[count:]}


def generation(
    settings: ContinuationConfig,
    base: Base,
    dense: dict[str, Any],
    *,
    method: Method | None = None,
    mode: Mode = "gathered",
) -> dict[str, Any]:
    """Lead a routed model along the dense one's continuations, and let it write the gallery.

    Args:
        dense: of `continuations`.
        method: None for the dense model, which keeps all of its own.

    Returns:
        `settings`; `kept` and `prefix`, each `{value, stderr, n, dense, per_prompt}` with the mean
        and its standard error over prompts; `sparsity_realised` over prompts and continuations;
        `gallery`: `{prompt, dense, text}` of each.
    """
    led, sparsity = dense["tokens"], 0.0
    written = [*led, *dense["gallery"]]
    if method is not None:
        rows: list[Row] = [*zip(dense["prompts"], led, strict=True), *_gallery(settings, base)]
        with routed(base.model, method, mode) as model:
            written = _write(model, rows, settings.new_tokens)
            sparsity = routing_of(model).counters.read().sparsity()
    same_BN = torch.tensor(written[: len(led)]) == torch.tensor(led)
    texts = (base.tokenizer.batch_decode(ids) for ids in (dense["gallery"], written[len(led) :]))
    return {
        "settings": asdict(settings),
        "kept": _mean(same_BN.double().mean(-1)),
        "prefix": _mean(same_BN.double().cumprod(-1).mean(-1)),
        "sparsity_realised": sparsity,
        "gallery": [
            {"prompt": prompt, "dense": beside, "text": text}
            for prompt, beside, text in zip(settings.gallery, *texts, strict=True)
        ],
    }


def _prompt(settings: ContinuationConfig, base: Base, document: Document) -> list[int]:
    """Ids from the middle of a document's first page, as openings are much alike; all of a short
    document."""
    length = settings.prompt_tokens
    ids = first_tokens(base.tokenizer, document.text, PAGE * length)
    start = max(0, (len(ids) - length) // 2)
    return list(ids[start : start + length])


def _gallery(settings: ContinuationConfig, base: Base) -> list[Row]:
    return [(base.tokenizer(prompt)["input_ids"], None) for prompt in settings.gallery]


def _mean(values_B: Tensor) -> dict[str, Any]:
    count = len(values_B)
    stderr = float(values_B.std() / count**0.5) if count > 1 else None
    own = {"per_prompt": [round(value, 6) for value in values_B.tolist()]}
    return {"value": float(values_B.mean()), "stderr": stderr, "n": count, "dense": 1.0, **own}


class _Led(LogitsProcessor):
    """Notes what the model would write next, and has it go on as it is led."""

    def __init__(self, led_BN: Tensor, free_B: Tensor) -> None:
        self.led_BN, self.free_B = led_BN, free_B
        self.chosen: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen_B = scores.argmax(-1)
        next_B = torch.where(self.free_B, chosen_B, self.led_BN[:, len(self.chosen)])
        self.chosen.append(chosen_B)
        return torch.full_like(scores, -torch.inf).scatter(1, next_B[:, None], 0.0)


@torch.no_grad()
def _write(model: PreTrainedModel, rows: Sequence[Row], count: int) -> list[list[int]]:
    """Greedy choice at each of `count` positions of every row; the end token is never chosen."""
    place = input_device(model)

    def work(part: Sequence[Row]) -> list[list[int]]:
        ids = [torch.tensor(prompt, device=place) for prompt, _ in part]
        padded: dict[str, Any] = {"batch_first": True, "padding_side": "left"}
        led = [[0] * count if tokens is None else list(tokens) for _, tokens in part]
        free_B = torch.tensor([tokens is None for _, tokens in part], device=place)
        leader = _Led(torch.tensor(led, device=place), free_B)
        model.generate(  # type: ignore[operator]
            input_ids=pad_sequence(ids, **padded),
            attention_mask=pad_sequence([torch.ones_like(row) for row in ids], **padded),
            logits_processor=LogitsProcessorList([leader]),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            repetition_penalty=1.0,
            pad_token_id=0,
        )
        written: list[list[int]] = torch.stack(leader.chosen, -1).tolist()
        return written

    with Bar(desc="greedy continuations"):
        return Fitting(model).run(rows, work)
