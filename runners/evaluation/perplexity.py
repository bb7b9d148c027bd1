"""Token perplexity with its spread over documents.

Shapes: B windows in a batch, T tokens of the longest, D model width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from methods.engine.decoder.families import decoder
from methods.engine.decoder.offload import materialised
from methods.engine.decoder.placement import device_of, input_device
from runners.corpus.source import Document
from runners.errors import UserError
from runners.evaluation.bootstrap import bootstrap_interval
from runners.runtime.memory import Fitting
from runners.runtime.progress import progress as progress_bar

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
    *,
    documents_limit: int | None = None,
    tokens_per_document: int = 512,
    context: int = 512,
    stride: int = 512,
    batch_size: int = 4,
    bootstrap_samples: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """exp(mean negative log-likelihood per token) with a 95 % interval over documents.

    Each document is cut to its first `tokens_per_document` tokens (special tokens that the
    tokenizer adds included). Its first token is never scored, every other token exactly once:
    input windows of `context` tokens start every `stride` tokens, and each scores the next
    tokens that no earlier window has scored.

    Args:
        model: causal LM, routed or not; its mode (eval) is the caller's.
        documents_limit: first documents only; None for all.
        stride: at most `context`; smaller gives each token more left context at more cost.
        batch_size: windows per forward pass, right-padded and masked; fewer where memory does not
            suffice.
        bootstrap_samples: resamplings of the documents for the percentile interval.

    Returns:
        `{value, low, high, tokens, documents, oom_halvings, per_document: [{name, nll, tokens}]}`;
        nll is the sum over the document in nats, tokens those scored; `oom_halvings` says how often
        a pass was too large.

    Raises:
        UserError: no document with at least two tokens, or impossible sizes.
    """
    _check_sizes(context, stride, batch_size, bootstrap_samples, tokens_per_document)
    kept = documents[:documents_limit]
    windows: list[Window] = []
    for index, document in enumerate(kept):
        ids = tokenizer(document.text, verbose=False)["input_ids"][:tokens_per_document]
        windows += windows_of(ids, index, context=context, stride=stride)
    return measure(
        model,
        windows,
        [document.name for document in kept],
        batch_size=batch_size,
        bootstrap_samples=bootstrap_samples,
        seed=seed,
        progress=progress,
    )


def joined_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    *,
    tokens: int | None = None,
    context: int = 2048,
    stride: int = 2048,
    batch_size: int = 4,
    bootstrap_samples: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Perplexity of one long text: the documents joined by blank lines, cut into windows.

    The protocol of the pruning and quantisation papers (with `stride = context`): no window
    knows where a document ends. The interval is over windows, as blocks of neighbouring tokens.

    Args:
        tokens: first tokens of the joined text only; None for all.
        context, stride: as for `perplexity`.

    Returns:
        As `perplexity`; what it calls documents are the windows.

    Raises:
        UserError: fewer than two tokens, or impossible sizes.
    """
    _check_sizes(context, stride, batch_size, bootstrap_samples, tokens)
    text = "\n\n".join(document.text for document in documents)
    ids = tokenizer(text, verbose=False)["input_ids"][:tokens]
    windows = [
        replace(window, document=index)
        for index, window in enumerate(windows_of(ids, 0, context=context, stride=stride))
    ]
    return measure(
        model,
        windows,
        [f"window-{window.document}" for window in windows],
        batch_size=batch_size,
        bootstrap_samples=bootstrap_samples,
        seed=seed,
        progress=progress,
    )


def _check_sizes(
    context: int, stride: int, batch_size: int, bootstrap_samples: int, tokens: int | None
) -> None:
    if not 1 <= stride <= context:
        raise UserError(f"stride must lie between 1 and context={context}, not {stride}")
    if batch_size < 1 or bootstrap_samples < 1 or (tokens is not None and tokens < 2):
        raise UserError(
            "perplexity needs batch_size and bootstrap_samples >= 1 and at least 2 tokens"
        )


def measure(
    model: PreTrainedModel,
    windows: list[Window],
    names: Sequence[str],
    *,
    batch_size: int,
    bootstrap_samples: int,
    seed: int,
    progress: bool = True,
) -> dict[str, Any]:
    """Perplexity over windows, with an interval over the documents that they belong to.

    Args:
        windows: sorted here by length, so that a pass pads little.
        names: of the documents, by `Window.document`.

    Raises:
        UserError: no window.
    """
    if not windows:
        raise UserError("no text to measure perplexity on: every document is shorter than 2 tokens")
    nll = np.zeros(len(names))
    tokens = np.zeros(len(names), dtype=np.int64)
    windows = sorted(windows, key=lambda window: -len(window.inputs))
    batches = [windows[i : i + batch_size] for i in range(0, len(windows), batch_size)]
    fitting = Fitting(model)
    shown: Iterable[list[Window]] = progress_bar(batches, "perplexity") if progress else batches
    for batch in shown:
        nlls = fitting.run(batch, lambda part: window_nlls(model, part))
        for window, window_nll in zip(batch, nlls, strict=True):
            nll[window.document] += window_nll
            tokens[window.document] += len(window.targets)

    scored = tokens > 0
    low, high = bootstrap_interval(nll[scored], tokens[scored], bootstrap_samples, seed)
    return {
        "value": math.exp(nll.sum() / tokens.sum()),
        "low": low,
        "high": high,
        "tokens": int(tokens.sum()),
        "documents": int(scored.sum()),
        "oom_halvings": fitting.halvings,
        "per_document": [
            {"name": names[i], "nll": float(nll[i]), "tokens": int(tokens[i])}
            for i in np.flatnonzero(scored).tolist()
        ],
    }


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
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    place = device_of(head)
    hidden, targets = hidden.to(place), targets.to(place)
    with materialised(head):
        parts = [
            functional.cross_entropy(head(h).float(), t, reduction="none").double().cpu()
            for h, t in zip(hidden.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True)
        ]
    return torch.cat(parts)
