"""Rows are cut from documents without padding, in an order that the seed gives."""

from __future__ import annotations

import pytest
import torch

from runners.corpus.packing import ReadOnce, pack_tokens
from runners.corpus.reading import after_documents, after_tokens
from runners.corpus.source import Document
from runners.errors import UserError
from tests.conftest import documents


def test_pack_joins_with_eos_and_drops_the_rest(tokenizer):
    options = {"seq_len": 10, "max_tokens": 35, "seed": 0}
    rows = pack_tokens(documents(1, words=20), tokenizer, **options)
    assert rows.shape == (3, 10)
    texts = [Document("x", "abc"), Document("y", "defg")]
    flat = pack_tokens(texts, tokenizer, seq_len=9, max_tokens=9, seed=0)[0].tolist()
    parts = [tokenizer("abc")["input_ids"], tokenizer("defg")["input_ids"]]
    end = [tokenizer.eos_token_id]
    assert flat in (parts[0] + end + parts[1] + end, parts[1] + end + parts[0] + end)
    with pytest.raises(UserError, match="fewer than one row"):
        pack_tokens(texts, tokenizer, seq_len=10, max_tokens=10, seed=0)


def test_pack_reads_every_document_before_a_second_piece_of_one(tokenizer):
    """A document's letter tells where each token is from; pieces are whole rows here."""
    texts = [Document(letter, letter * 29) for letter in "abcd"]
    of = {tokenizer(letter)["input_ids"][0]: letter for letter in "abcd"}
    assert all(len(tokenizer(text.text)["input_ids"]) == 29 for text in texts)
    rows = pack_tokens(texts, tokenizer, seq_len=10, max_tokens=120, seed=3)
    origin = [of[row[0]] for row in rows.tolist()]
    rounds = [sorted(origin[i : i + 4]) for i in (0, 4, 8)]
    assert rounds == [list("abcd")] * 3
    assert (rows == tokenizer.eos_token_id).sum() == 4
    first = pack_tokens(texts, tokenizer, seq_len=10, max_tokens=50, seed=3)
    assert torch.equal(first, rows[:5]), "a larger budget reads on after a smaller one's rows"
    assert not torch.equal(rows, pack_tokens(texts, tokenizer, seq_len=10, max_tokens=120, seed=4))


def test_each_text_is_read_once(tokenizer):
    seen = []

    class Counting:
        eos_token_id = tokenizer.eos_token_id

        def __call__(self, text, **options):
            seen.append(text)
            return tokenizer(text, **options)

    texts, options = documents(5), {"max_tokens": 200, "seed": 1}
    once = ReadOnce(Counting())
    for seq_len in (10, 25):
        found = pack_tokens(texts, once, seq_len=seq_len, **options)
        assert torch.equal(found, pack_tokens(texts, tokenizer, seq_len=seq_len, **options))
    assert sorted(seen) == sorted(document.text for document in texts)


def test_enough_is_one_row_of_every_document(tokenizer):
    """Twelve rows of 10: a book is one of them, and shorter texts what they are."""
    enough = after_tokens(120, 10, tokenizer)
    texts = [Document("book", "b" * 10_000)] + [Document("short", "four")] * 30
    read = next(n for n, text in enumerate(texts, start=1) if enough(text))
    assert read == 1 + 110 // 5
    rows = pack_tokens(texts[:read], tokenizer, seq_len=10, max_tokens=120, seed=0)
    assert len(rows) == 12


def test_enough_documents():
    enough = after_documents(3)
    assert [enough(Document("", "")) for _ in range(3)] == [False, False, True]
