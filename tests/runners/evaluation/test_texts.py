"""Rows have no padding, come from their own split and repeat with the seed."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from methods.base import StageBudget
from runners.base_model.load import build_budget
from runners.corpus.rows import Texts
from runners.corpus.source import Document
from tests.conftest import compose_tiny, documents

SPLITS = {
    "train": documents(9),
    "calibration": documents(5, first=20),
    "test": documents(4, first=40),
}


@pytest.fixture
def budget():
    return build_budget(compose_tiny())


@pytest.fixture
def make(tokenizer):
    return lambda splits=SPLITS, seed=0: Texts(splits, tokenizer, 32, seed)


def strings(tokenizer, rows):
    return [tokenizer.decode(row) for row in rows]


def test_sizes(make, budget):
    text = make().for_probe(budget)
    assert text.train.shape == (512 // 32, 32)
    assert text.calibration.shape == (512 // 32, 32)
    assert torch.equal(text.sensitivity, text.train[: 64 // 32])
    assert make().rows(StageBudget(3, 2, 16, accumulate=2)).shape == (12, 16)


def test_no_padding(make, budget, tokenizer):
    text = make().for_probe(budget)
    for rows in (text.train, text.calibration, make().rows(budget.routers)):
        assert rows.dtype == torch.int64
        assert not (rows == tokenizer.pad_token_id).any()


def test_rows_come_from_their_split_only(make, budget, tokenizer):
    text = make().for_probe(budget)
    for split, rows in (("train", text.train), ("calibration", text.calibration)):
        own = "<eos>".join(d.text for d in SPLITS[split])
        inside = [s for s in strings(tokenizer, rows) if "<eos>" not in s]
        assert len(inside) > 5
        assert all(s in own for s in inside)
        others = "<eos>".join(d.text for o, d_ in SPLITS.items() if o != split for d in d_)
        assert not any(s in others for s in inside)


def test_the_seed_orders_and_repeats(make, budget):
    rows = [make(seed=seed).rows(budget.routers) for seed in (0, 0, 1)]
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])


def test_rows_are_pieces_of_one_document_each(tokenizer):
    text = Texts({"train": [Document("a", "abcdefgh"), Document("b", "ijkl")]}, tokenizer, 4, 0)
    rows = text.rows(StageBudget(steps=3, batch_size=1, seq_len=4))
    assert sorted(strings(tokenizer, rows)) == ["abcd", "efgh", "ijkl"]


def test_short_text_gives_fewer_rows(make):
    one = {**SPLITS, "train": [Document("only", "x" * 70)]}
    assert make(one).rows(StageBudget(100, 4, 32)).shape == (2, 32)


def changed(split, index):
    """The documents with one letter of one of them changed near its end."""
    texts = list(SPLITS[split])
    texts[index] = dataclasses.replace(texts[index], text=texts[index].text[:-2] + "Z!")
    return {**SPLITS, split: texts}


@pytest.mark.parametrize("index", range(9))
def test_digest_sees_any_training_document(make, budget, index):
    """Stages may read past what the fits read, so every document has to count."""
    assert make(changed("train", index)).digest(budget) != make().digest(budget)


def test_digest_sees_calibration_seed_and_length_but_not_test(make, budget, tokenizer):
    base = make().digest(budget)
    assert make().digest(budget) == base
    assert make(changed("test", 0)).digest(budget) == base
    assert make(changed("calibration", 0)).digest(budget) != base
    assert make(seed=1).digest(budget) != base
    assert Texts(SPLITS, tokenizer, 16, 0).digest(budget) != base
