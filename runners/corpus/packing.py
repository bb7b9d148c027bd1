"""Rows of tokens without padding, cut from documents."""

from __future__ import annotations

import itertools
import random
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from runners.corpus.source import Document
from runners.errors import UserError

Ids = array
"""Tokens, four bytes each: a list of a large budget's would take ten times the memory."""


def pack_tokens(
    documents: Sequence[Document], tokenizer: Any, *, seq_len: int, max_tokens: int, seed: int
) -> Any:
    """Rows of tokens without padding, from as many documents as there are rows.

    Each document ends with EOS and is cut into pieces of `seq_len`; what is left of it at its end
    is packed with other documents' ends. In an order drawn from the seed, every document gives one
    of its pieces before any gives a second: a small budget reads many documents instead of one or
    two long ones.

    Args:
        seq_len: tokens per row.
        max_tokens: rounded down to whole rows; fewer if the documents hold fewer.

    Returns:
        int64 tensor [rows, seq_len].

    Raises:
        UserError: not even one row of text.
    """
    import torch

    pieces = _pieces(documents, tokenizer, seq_len, random.Random(seed))
    rows = list(itertools.islice(_rows(pieces, seq_len), max_tokens // seq_len))
    if not rows:
        raise UserError(f"the text has too few tokens, fewer than one row of {seq_len}")
    return torch.from_numpy(np.array(rows, dtype=np.int64))


def _rows(pieces: Iterable[Ids], length: int) -> Iterator[Ids]:
    """Whole pieces as they are; documents' ends, which are shorter, one after another."""
    ends = array("i")
    for piece in pieces:
        if len(piece) == length:
            yield piece
            continue
        ends += piece
        while len(ends) >= length:
            yield ends[:length]
            ends = ends[length:]


def _pieces(
    documents: Sequence[Document], tokenizer: Any, length: int, drawn: random.Random
) -> Iterator[Ids]:
    """One piece of every document, then a second of each that has one, and so on."""
    order = list(range(len(documents)))
    drawn.shuffle(order)
    left: list[list[Ids]] = []
    for index in order:
        ids = array("i", tokenizer(documents[index].text, verbose=False)["input_ids"])
        ids.append(tokenizer.eos_token_id)
        cut = [ids[start : start + length] for start in range(0, len(ids), length)]
        drawn.shuffle(cut)
        left.append(cut)
        yield cut.pop()
    while left := [cut for cut in left if cut]:
        for cut in left:
            yield cut.pop()


class ReadOnce:
    """A tokenizer that reads each document once: every cut of the text asks for it again."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.eos_token_id = tokenizer, tokenizer.eos_token_id
        self._ids: dict[str, Ids] = {}

    def __call__(self, text: str, **options: Any) -> dict[str, Ids]:
        if text not in self._ids:
            self._ids[text] = array("i", self.tokenizer(text, **options)["input_ids"])
        return {"input_ids": self._ids[text]}
