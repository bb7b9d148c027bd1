"""Read the documents of a point and cut them into rows of tokens without padding.

Nothing heavy is imported before rows are made, so that a launcher checks a text in a moment.
"""

from __future__ import annotations

import functools
import itertools
import random
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from runners.corpus.source import SPLITS, Document, digest, load_documents
from runners.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from methods.base import Budget, StageBudget
    from runners.point_config import BudgetConfig, DataConfig

TASK_DOCUMENTS = 200
"""Test documents that are read at least, for the tasks that are made of them."""
Encode = Callable[[str], Sequence[int]]
"""Tokens of a text, its end token included."""


@dataclass(frozen=True)
class ProbeText:
    """Token rows, int64 [rows, tokens], all without padding."""

    train: Tensor
    calibration: Tensor
    sensitivity: Tensor


@dataclass(frozen=True)
class Texts:
    """Cuts documents into rows, deterministically from the seed."""

    documents: Mapping[str, Sequence[Document]]
    """By split; `train` and `calibration` are cut, test text never."""
    encode: Encode
    seq_len: int
    """Tokens per row of the training-free fits and the calibration."""
    seed: int
    fit_tokens: int = 0
    """Of train, read by the fits; stages train on the text after them, because a forecaster errs
    less on the tokens that it was solved on."""

    def for_probe(self, budget: Budget) -> ProbeText:
        """Cut what the probe reads: fits and sensitivity from train, calibration from its own."""
        train = self._pack("train", budget.fit_tokens, self.seq_len)
        rows = max(1, budget.sensitivity_tokens // self.seq_len)
        calibration = self._pack("calibration", budget.calibration_tokens, self.seq_len)
        return ProbeText(train=train, calibration=calibration, sensitivity=train[:rows])

    def rows(self, budget: StageBudget) -> Tensor:
        """Cut training rows of a stage, int64 [n, seq_len]: its token budget, or all the text."""
        wanted = max(1, budget.tokens // budget.seq_len)
        return self._pack("train", self.fit_tokens + budget.tokens, budget.seq_len)[-wanted:]

    def digest(self, budget: Budget) -> str:
        """Hash all that this class can return under a budget: the text and how it is cut."""
        probe = self.for_probe(budget)
        rows = [probe.train.tolist(), probe.calibration.tolist()]
        return digest([rows, [[d.text for d in self.documents[n]] for n in SPLITS[:2]]])

    def _pack(self, split: str, tokens: int, seq_len: int) -> Tensor:
        tokens = max(tokens, seq_len)
        return pack_tokens(self.documents[split], self.encode, seq_len, tokens, self.seed)


def pack_tokens(
    documents: Sequence[Document], encode: Encode, seq_len: int, max_tokens: int, seed: int
) -> Tensor:
    """Cut at most `max_tokens` of documents into rows, int64 [rows, seq_len].

    Each document is cut into pieces of `seq_len`; what is left of it at its end is packed with
    other documents' ends. In an order drawn from the seed, every document gives one of its pieces
    before any gives a second: a small budget reads many documents instead of a few long ones.

    Raises:
        UserError: not even one row of text.
    """
    import torch

    rows: list[Sequence[int]] = []
    ends = array("i")
    for piece in _pieces(documents, encode, seq_len, random.Random(seed)):
        if len(rows) == max_tokens // seq_len:
            break
        if len(piece) == seq_len:
            rows.append(piece)
            continue
        ends.extend(piece)
        if len(ends) >= seq_len:
            rows.append(ends[:seq_len])
            ends = ends[seq_len:]
    if not rows:
        raise UserError(f"the text has too few tokens, fewer than one row of {seq_len}")
    return torch.from_numpy(np.array(rows, dtype=np.int64))


def _pieces(
    documents: Sequence[Document], encode: Encode, length: int, drawn: random.Random
) -> Iterator[Sequence[int]]:
    """One piece of every document, then a second of each that has one, and so on."""
    order, left = list(documents), []
    drawn.shuffle(order)
    for document in order:
        ids = encode(document.text)
        cut = [ids[start : start + length] for start in range(0, len(ids), length)]
        drawn.shuffle(cut)
        left.append(cut)
        yield cut.pop()
    while left := [cut for cut in left if cut]:
        for cut in left:
            yield cut.pop()


def encoder(tokenizer: Any) -> Encode:
    """Tokenise each text once: every cut asks for it again.

    Raises:
        UserError: a tokenizer without an end token, which parts the documents of a row.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise UserError("the model's tokenizer has no end token (eos_token): rows need one")

    @functools.cache
    def encode(text: str) -> Sequence[int]:
        # four bytes a token: a list of a large budget's would take ten times the memory
        return array("i", [*tokenizer(text, verbose=False)["input_ids"], end])

    return encode


def read_documents(
    data: DataConfig, budget: BudgetConfig, test_limit: int | None, seed: int, encode: Encode
) -> dict[str, list[Document]]:
    """Read of each split as many documents as a point uses, whatever its method.

    Args:
        test_limit: test documents that the perplexity is of; None for all.

    Raises:
        UserError: as `load_documents`.
    """
    stages = (budget.forecasters, budget.routers, budget.lora)
    # the fits and, after them, the stage that reads most
    train = budget.fit_tokens + max(budget.tokens or 0, *(stage.tokens for stage in stages))
    counted, most = itertools.count(1), max(test_limit or 0, TASK_DOCUMENTS)
    enough: dict[str, Callable[[Document], bool]] = {
        "train": after_tokens(train, budget.seq_len, encode),
        "calibration": after_tokens(budget.calibration_tokens, budget.seq_len, encode),
        "test": lambda _: test_limit is not None and next(counted) >= most,
    }
    return {name: load_documents(data, name, seed=seed, enough=enough[name]) for name in SPLITS}


def check_documents(
    data: DataConfig, budget: BudgetConfig, test_limit: int | None, seed: int
) -> dict[str, list[Document]]:
    """Read local text as a point will, without its tokenizer: eight bytes are one token.

    Returns:
        At least what a point reads.

    Raises:
        UserError: as `load_documents`; not even one row of text.
    """
    found = read_documents(data, budget, test_limit, seed, lambda text: text.encode()[::8])
    for split in SPLITS[:2]:
        if sum(len(d.text.encode()) + 1 for d in found[split]) < budget.seq_len:
            raise UserError(f"the {split} text has too few tokens for a row of {budget.seq_len}")
    return found


def load_rows(
    data: DataConfig, split: str, encode: Encode, *, seq_len: int, tokens: int, seed: int = 0
) -> Tensor:
    """Read as many documents of a split as rows of so many tokens need, and cut them."""
    documents = load_documents(data, split, enough=after_tokens(tokens, seq_len, encode))
    return pack_tokens(documents, encode, seq_len, tokens, seed)


def after_tokens(tokens: int, seq_len: int, encode: Encode) -> Callable[[Document], bool]:
    """True once there are `tokens`, if no document gives more than one row of `seq_len`.

    That is what `pack_tokens` takes, so that reading on would change nothing but the order; a
    single long book does not count as text enough.
    """
    left = max(tokens, seq_len)

    def enough(document: Document) -> bool:
        nonlocal left
        left -= min(len(encode(document.text)), seq_len)
        return left <= 0

    return enough
