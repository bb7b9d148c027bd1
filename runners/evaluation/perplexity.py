"""Measure token perplexity with its spread over documents.

Shapes: B windows in a batch, T tokens of the longest, D model width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from methods.engine.decoder.families import decoder
from methods.engine.decoder.head import Head
from methods.engine.decoder.offload import materialised
from methods.engine.decoder.placement import device_of, input_device
from runners.corpus.source import Document
from runners.errors import UserError
from runners.evaluation.scores import perplexity_interval
from runners.runtime.memory import Fitting
from runners.runtime.progress import progress

if TYPE_CHECKING:
    from runners.point_config import WindowConfig

CHARACTERS, BESIDE_CUT = 16, 64
"""Of a text that are tokenised for a token of it at first, and tokens that a cut may change."""
LOGIT_ROWS = 512
"""Predicted tokens whose [rows, V] logits are held in float32 at a time."""


@dataclass(frozen=True)
class Window:
    """Tokens of one document that pass through the model together."""

    document: int
    start: int
    """Index of the first input token in the document."""
    inputs: tuple[int, ...]
    targets: tuple[int, ...]
    """The next token of the last `len(targets)` inputs: those that this window scores."""


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    sizes: WindowConfig,
    *,
    tokens: int | None = None,
    most: int | None = None,
    joined: bool = False,
) -> dict[str, Any]:
    """Measure exp(mean negative log-likelihood per token) with a 95 % interval over documents.

    The first token of a document is never scored, every other one at most once: input windows of
    `context` tokens start every `stride` tokens, and each scores the next tokens that no earlier
    window has scored. Of more than `most` windows of a document, so many are read. Joined, it is
    the protocol of the pruning and quantisation papers (with `stride = context`): the documents are
    one text, joined by blank lines, no window knows where a document ends, and the interval is over
    windows, as blocks of neighbouring tokens.

    Args:
        model: causal LM, routed or not; its mode (eval) is the caller's.
        sizes: a smaller stride gives each token more left context at more cost; windows of a
            forward pass are right-padded and masked, fewer where memory does not suffice.
        tokens: first ones of each document, or of the joined text, special tokens that the
            tokenizer adds included; None for all.
        most: windows of a document, spread evenly over it from its first one; None for all.

    Returns:
        `{value, low, high, tokens, documents, oom_halvings, per_document: [{name, nll, tokens}]}`;
        nll is the sum over the document (joined: the window) in nats, tokens those scored;
        `oom_halvings` says how often a pass was too large.

    Raises:
        UserError: no document with at least two tokens.
    """
    texts = [document.text for document in documents]
    windows: list[Window] = []
    for index, text in enumerate(["\n\n".join(texts)] if joined else texts):
        ids = first_tokens(tokenizer, text, tokens)
        cut = windows_of(ids, index, context=sizes.context, stride=sizes.stride)
        windows += cut if most is None else spread(cut, most)
    names = [document.name for document in documents]
    if joined:
        windows = [replace(window, document=index) for index, window in enumerate(windows)]
        names = [f"window-{index}" for index in range(len(windows))]
    if not windows:
        raise UserError("no text to measure perplexity on: every document is shorter than 2 tokens")

    nll, scored = np.zeros(len(names)), np.zeros(len(names), dtype=np.int64)
    windows.sort(key=lambda window: -len(window.inputs))  # so that a pass pads little
    rows, fitting = sizes.batch_size, Fitting(model)
    batches = [windows[start : start + rows] for start in range(0, len(windows), rows)]
    for batch in progress(batches, "perplexity"):
        nlls = fitting.run(batch, lambda part: window_nlls(model, part))
        for window, window_nll in zip(batch, nlls, strict=True):
            nll[window.document] += window_nll
            scored[window.document] += len(window.targets)

    kept = np.flatnonzero(scored)
    low, high = perplexity_interval(nll[kept], scored[kept])
    return {
        "value": math.exp(nll.sum() / scored.sum()),
        "low": low,
        "high": high,
        "tokens": int(scored.sum()),
        "documents": len(kept),
        "oom_halvings": fitting.halvings,
        "per_document": [
            {"name": names[i], "nll": float(nll[i]), "tokens": int(scored[i])}
            for i in kept.tolist()
        ],
    }


def first_tokens(tokenizer: PreTrainedTokenizerBase, text: str, count: int | None) -> Sequence[int]:
    """Tokenise the beginning of a text: its first `count` tokens, or all.

    Of a long text no more is tokenised than that needs; the cut may change the tokens beside it,
    never those a good way before it.
    """
    characters = len(text) if count is None else CHARACTERS * count
    while True:
        ids: Sequence[int] = tokenizer(text[:characters], verbose=False)["input_ids"]
        if characters >= len(text) or (count is not None and len(ids) >= count + BESIDE_CUT):
            return ids[:count]
        characters *= 4


def windows_of(ids: Sequence[int], document: int, *, context: int, stride: int) -> list[Window]:
    """Cut a document so that each token but the first is predicted exactly once."""
    windows: list[Window] = []
    scored = 1
    for start in range(0, len(ids), stride):
        if scored >= len(ids):
            break
        end = min(start + context, len(ids) - 1)
        windows.append(Window(document, start, tuple(ids[start:end]), tuple(ids[scored : end + 1])))
        scored = end + 1
    return windows


def spread(windows: Sequence[Window], most: int) -> Sequence[Window]:
    """Take `most` of a document's windows at equal distances, the first one among them."""
    if len(windows) <= most:
        return windows
    return [windows[index * len(windows) // most] for index in range(most)]


@torch.no_grad()
def window_nlls(model: PreTrainedModel, windows: Sequence[Window]) -> list[float]:
    """Sum of -log p over each window's targets, nats."""
    device = input_device(model)
    longest = max(len(window.inputs) for window in windows)
    ids_BT = torch.zeros(len(windows), longest, dtype=torch.long)
    mask_BT = torch.zeros(len(windows), longest, dtype=torch.long)
    scored_BT = torch.zeros(len(windows), longest, dtype=torch.bool)
    for row, window in enumerate(windows):
        end = len(window.inputs)
        ids_BT[row, :end] = torch.tensor(window.inputs)
        mask_BT[row, :end] = 1
        scored_BT[row, end - len(window.targets) : end] = True
    # behind a causal row's end nothing is read: only a router has to be told what padding is
    mask = None if getattr(model, "routing", None) is None else mask_BT.to(device)
    hidden_BTD = decoder(model)(input_ids=ids_BT.to(device), attention_mask=mask, use_cache=False)[
        0
    ]
    targets = torch.tensor([t for window in windows for t in window.targets])
    losses = _token_losses(model, hidden_BTD[scored_BT.to(hidden_BTD.device)], targets)
    return [float(part.sum()) for part in losses.split([len(w.targets) for w in windows])]


def _token_losses(model: PreTrainedModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """-log p of each target, float64 [rows] on the host; logits are held in parts only."""
    head = Head(model)
    place = device_of(head.module)
    hidden, targets = hidden.to(place), targets.to(place)
    with materialised(head.module):
        parts = [
            functional.cross_entropy(head(h), t, reduction="none").double().cpu()
            for h, t in zip(hidden.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True)
        ]
    return torch.cat(parts)
