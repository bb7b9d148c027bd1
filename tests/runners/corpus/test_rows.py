"""Rows are cut from documents without padding, in an order that the seed gives."""

from __future__ import annotations

import copy
import dataclasses
import json
from dataclasses import replace

import pytest
import torch

from methods.base import StageBudget
from runners.base_model.load import build_budget
from runners.corpus.rows import (
    Texts,
    after_tokens,
    check_documents,
    encoder,
    pack_tokens,
    read_documents,
)
from runners.corpus.source import Document
from runners.errors import UserError
from runners.options import parse_section
from runners.point_config import BudgetConfig, DataConfig, PointConfig
from tests.conftest import compose_tiny, documents


def test_pack_joins_with_eos_and_drops_the_rest(tokenizer):
    options = {"seq_len": 10, "max_tokens": 35, "seed": 0}
    rows = pack_tokens(documents(1, words=20), encoder(tokenizer), **options)
    assert rows.shape == (3, 10)
    texts = [Document("x", "abc"), Document("y", "defg")]
    flat = pack_tokens(texts, encoder(tokenizer), seq_len=9, max_tokens=9, seed=0)[0].tolist()
    parts = [tokenizer("abc")["input_ids"], tokenizer("defg")["input_ids"]]
    end = [tokenizer.eos_token_id]
    assert flat in (parts[0] + end + parts[1] + end, parts[1] + end + parts[0] + end)
    with pytest.raises(UserError, match="fewer than one row"):
        pack_tokens(texts, encoder(tokenizer), seq_len=10, max_tokens=10, seed=0)


def test_pack_reads_every_document_before_a_second_piece_of_one(tokenizer):
    """A document's letter tells where each token is from; pieces are whole rows here."""
    texts = [Document(letter, letter * 29) for letter in "abcd"]
    of = {tokenizer(letter)["input_ids"][0]: letter for letter in "abcd"}
    assert all(len(tokenizer(text.text)["input_ids"]) == 29 for text in texts)
    rows = pack_tokens(texts, encoder(tokenizer), seq_len=10, max_tokens=120, seed=3)
    origin = [of[row[0]] for row in rows.tolist()]
    rounds = [sorted(origin[i : i + 4]) for i in (0, 4, 8)]
    assert rounds == [list("abcd")] * 3
    assert (rows == tokenizer.eos_token_id).sum() == 4
    first = pack_tokens(texts, encoder(tokenizer), seq_len=10, max_tokens=50, seed=3)
    assert torch.equal(first, rows[:5]), "a larger budget reads on after a smaller one's rows"
    assert not torch.equal(
        rows, pack_tokens(texts, encoder(tokenizer), seq_len=10, max_tokens=120, seed=4)
    )


def test_each_text_is_read_once(tokenizer):
    seen = []

    class Counting:
        eos_token_id = tokenizer.eos_token_id

        def __call__(self, text, **options):
            seen.append(text)
            return tokenizer(text, **options)

    texts, options = documents(5), {"max_tokens": 200, "seed": 1}
    once = encoder(Counting())
    for seq_len in (10, 25):
        found = pack_tokens(texts, once, seq_len=seq_len, **options)
        assert torch.equal(
            found, pack_tokens(texts, encoder(tokenizer), seq_len=seq_len, **options)
        )
    assert sorted(seen) == sorted(document.text for document in texts)


def test_a_tokenizer_without_an_end_token_is_one_line(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.eos_token = None
    with pytest.raises(UserError, match="no end token"):
        encoder(other)


def test_of_test_text_at_least_what_the_tasks_are_made_of(tmp_path, tokenizer):
    for split in SPLITS:
        lines = [json.dumps({"text": f"{split} {n}"}) for n in range(300)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    data = DataConfig(dir=str(tmp_path))
    budget = parse_section(BudgetConfig, compose_tiny()["budget"])
    for limit, expected in ((None, 300), (4, 200), (250, 250)):
        found = read_documents(data, budget, limit, 0, encoder(tokenizer))
        assert len(found["test"]) == expected
        checked = check_documents(data, budget, limit, 0)
        for split, read in found.items():
            assert checked[split][: len(read)] == read, "the check reads what the point reads"
    assert len(found["train"]) < 300
    longer = replace(budget, tokens=10 * budget.fit_tokens)
    read = read_documents(data, longer, 4, 0, encoder(tokenizer))["train"]
    assert len(found["train"]) < len(read), "text for the steps that the tokens in all may bring"


def test_enough_is_one_row_of_every_document(tokenizer):
    """Twelve rows of 10: a book is one of them, and shorter texts what they are."""
    enough = after_tokens(120, 10, encoder(tokenizer))
    texts = [Document("book", "b" * 10_000)] + [Document("short", "four")] * 30
    read = next(n for n, text in enumerate(texts, start=1) if enough(text))
    assert read == 1 + 110 // 5
    rows = pack_tokens(texts[:read], encoder(tokenizer), seq_len=10, max_tokens=120, seed=0)
    assert len(rows) == 12


SPLITS = {
    "train": documents(9),
    "calibration": documents(5, first=20),
    "test": documents(4, first=40),
}


@pytest.fixture
def budget():
    return build_budget(PointConfig.parse(compose_tiny()).budget)


@pytest.fixture
def make(tokenizer):
    return lambda splits=SPLITS, seed=0: Texts(splits, encoder(tokenizer), 32, seed)


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
    text = Texts(
        {"train": [Document("a", "abcdefgh"), Document("b", "ijkl")]}, encoder(tokenizer), 4, 0
    )
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
    assert Texts(SPLITS, encoder(tokenizer), 16, 0).digest(budget) != base
