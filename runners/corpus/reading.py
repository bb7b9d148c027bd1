"""The documents of a point: of each split as many as its budget and its evaluation use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from methods.base import Budget
from runners.base_model.load import build_budget
from runners.corpus.source import Document, load_documents

TASK_DOCUMENTS = 200
"""Test documents that are read at least, for the tasks that are made of them."""


def read_split(config: Mapping[str, Any], split: str, tokenizer: Any) -> list[Document]:
    """The documents of a split that a point reads.

    A method does not change them, so that all that are compared get the same text.

    Args:
        config: resolved.
        split: `train`, `calibration` or `test`.

    Raises:
        UserError: as `load_documents`.
    """
    enough = _enough(config, split, tokenizer)
    return load_documents(split=split, seed=config["seed"], enough=enough, **config["data"])


def _enough(
    config: Mapping[str, Any], split: str, tokenizer: Any
) -> Callable[[Document], bool] | None:
    if split == "test":
        limit = config["eval"]["perplexity"]["documents_limit"]
        return None if limit is None else after_documents(max(limit, TASK_DOCUMENTS))
    budget = build_budget(config)
    tokens = _train_tokens(budget) if split == "train" else budget.calibration_tokens
    return after_tokens(tokens, config["budget"]["seq_len"], tokenizer)


def _train_tokens(budget: Budget) -> int:
    """What the fits read and, after it, the stage that reads most."""
    stages = (budget.forecasters, budget.routers, budget.lora)
    return budget.fit_tokens + max(stage.tokens for stage in stages)


def after_tokens(tokens: int, seq_len: int, tokenizer: Any) -> Callable[[Document], bool]:
    """True once there are `tokens`, if no document gives more than one row of `seq_len`.

    That is what `pack_tokens` takes, so that reading on would change nothing but the order; a
    single long book does not count as text enough.
    """
    left = max(tokens, seq_len)

    def enough(document: Document) -> bool:
        nonlocal left
        ids = tokenizer(document.text, verbose=False)["input_ids"]
        left -= min(len(ids) + 1, seq_len)
        return left <= 0

    return enough


def after_documents(count: int) -> Callable[[Document], bool]:
    """True once there are `count` documents."""
    left = count

    def enough(_: Document) -> bool:
        nonlocal left
        left -= 1
        return left <= 0

    return enough
