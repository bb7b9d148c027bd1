"""The same texts in every format are the same documents; a mistake is named with file and line."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import tempfile
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runners.corpus.formats import ENDINGS, LONGEST, TEXT_PART, ending_of, texts_of
from runners.corpus.source import SPLITS, digest, load_documents
from runners.errors import UserError
from runners.launching.command_line import prepare
from runners.point_config import DataConfig

PACK = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".zst": lambda content: pa.Codec("zstd").compress(content, asbytes=True),
}


def lines(texts: Sequence[str]) -> bytes:
    return "".join(json.dumps({"n": n, "text": t}) + "\n" for n, t in enumerate(texts)).encode()


def array(texts: Sequence[str]) -> bytes:
    """Pretty-printed, and beyond ASCII as it is."""
    rows = [{"meta": {"text": ["]"]}, "text": text} for text in texts]
    return json.dumps(rows, indent=1, ensure_ascii=False).encode()


def table(texts: Sequence[str]) -> bytes:
    return pd.DataFrame({"n": range(len(texts)), "text": texts}).to_csv(index=False).encode()


WRITE = {".jsonl": lines, ".json": array, ".csv": table}


def write(folder: Path, ending: str, texts: Sequence[str]) -> None:
    """Of plain text a file each, of every other format one file."""
    form = "." + ending.split(".")[1]
    pack = PACK[ending.removeprefix(form)]
    if form == ".parquet":
        pd.DataFrame({"text": texts}).to_parquet(folder / "train.parquet")
    elif form == ".txt":
        for number, text in enumerate(texts):
            (folder / f"train-{number:05}{ending}").write_bytes(pack(text.encode()))
    else:
        (folder / f"train{ending}").write_bytes(pack(WRITE[form](texts)))


def read(folder: Path) -> dict[str, list[str]]:
    data = DataConfig(dir=str(folder), shuffle_buffer=0)
    return {split: [d.text for d in load_documents(data, split)] for split in SPLITS}


LETTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\r\ufeff")


@settings(max_examples=8, deadline=None)
@given(st.lists(st.text(LETTERS, min_size=1, max_size=40), min_size=3, max_size=30))
@pytest.mark.parametrize("ending", ENDINGS)
def test_every_format_gives_the_same_documents(ending, texts):
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        write(Path(one), ".jsonl", texts)
        write(Path(other), ending, texts)
        expected, found = read(Path(one)), read(Path(other))
    assert sorted(t for split in found.values() for t in split) == sorted(texts)
    assert found == expected
    assert digest(found) == digest(expected)


@pytest.mark.parametrize("size", [1, 100, 2**16, 3 * 2**16])
@pytest.mark.parametrize("as_lines", [True, False])
def test_json_is_read_across_any_border_of_its_parts(tmp_path, size, as_lines):
    """Objects about as long as a part, whose borders fall into words, numbers and escapes."""
    rows = [
        {"a": [True, None, -1.5e-3, {}], "text": '\u00e9"\\\n' * (size // 4) + "x" * n}
        for n in range(40)
    ]
    content = "\n".join(map(json.dumps, rows)) if as_lines else json.dumps(rows, indent=2)
    (tmp_path / "a.json").write_text(content)
    assert list(texts_of(tmp_path / "a.json", "text")) == [row["text"] for row in rows]


def test_a_long_plain_text_is_documents_that_end_with_lines(tmp_path):
    book = "".join(f"line {n} " + "word " * (n % 40) + "\n" for n in range(2000))
    (tmp_path / "book.txt").write_text(book)
    parts = list(texts_of(tmp_path / "book.txt", "text"))
    assert "".join(parts) == book and len(parts) > 3
    assert all(part.endswith("\n") and len(part) < TEXT_PART + 300 for part in parts)
    (tmp_path / "line.txt").write_text("\u00e9" * 3 * TEXT_PART)
    parts = list(texts_of(tmp_path / "line.txt", "text"))
    assert "".join(parts) == "\u00e9" * 3 * TEXT_PART and len(parts) > 2


@pytest.mark.parametrize("ending", [".txt", ".json", ".csv", ".jsonl", ".json.gz"])
def test_a_large_file_is_never_in_memory_as_a_whole(tmp_path, ending):
    """Of 12 MB of texts at most a few parts."""
    texts = [f"{n} " + "the people of this union\n" * 400 for n in range(1200)]
    form = "." + ending.split(".")[1]
    content = "".join(texts).encode() if form == ".txt" else WRITE[form](texts)
    file = tmp_path / f"train{ending}"
    file.write_bytes(PACK[ending.removeprefix(form)](content))
    del texts, content
    tracemalloc.start()
    size = sum(len(text) for text in texts_of(file, "text"))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size > 1.1e7 and most < 3e6


def test_a_byte_order_mark_is_no_text(tmp_path):
    for name, content in (("a.csv", "text\na\n"), ("a.txt", "a"), ("a.json", '[{"text": "a"}]')):
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
        assert list(texts_of(tmp_path / name, "text")) == ["a"]


MISTAKES = {
    "an object is broken": (".json", b'[{"text": "a"},\n{"text": b}]', 2, "no JSON .Expecting"),
    "an array is torn": (".json", b'[{"text": "a"},\n', 2, "the array has no end"),
    "a text is torn": (".json", b'[{"text": "a"},\n\n{"text": "b', 3, "no JSON .Unterminated"),
    "words beside an array": (".json", b'[{"text": "a"}]\nend', 2, "no JSON"),
    "no objects": (".json", b'["a",\n"b"]', 1, "no JSON object with a field 'text'"),
    "another field": (".json", b'[\n{"body": "a"}]', 2, "has no column 'text' but 'body'"),
    "no text in it": (".json", b'[\n{"text": ["a"]}]', 2, "holds no text but a list"),
    "nested": (".json", b'{"text": "a"}\n' + b"[" * 10**5, 2, "no JSON"),
    "another column": (".csv", b"\nn;text\n1;a\n", 2, "has no column 'text' but 'n;text'"),
    "a comma": (".csv", b"text,n\na,1\n\na, b,2\n", 4, "3 columns, 2 in the first line"),
    "too few": (".csv", b"n,text\n1,a\n2\n", 3, "1 columns, 2 in the first line"),
    "an open quote": (".csv", b'text\na\n"b\n' + b"c\n" * 9, 3, "unexpected end of data"),
    "a long quote": (".csv", b'text\n"' + b"c" * (5 * LONGEST), 2, "larger than field limit"),
    "Latin letters": (".csv", b"text\na\n\xe9t\xe9\n", 3, "is no UTF-8 text"),
    "Latin text": (".txt", b"a\n\nb \xe9t\xe9\n", 3, "is no UTF-8 text"),
    "Latin JSON": (".json", b'[{"text": "a"},\n{"text": "\xe9t"}]', 2, "is no UTF-8 text"),
}


@pytest.mark.parametrize("name", MISTAKES)
@pytest.mark.parametrize("packed", ["", ".zst"])
def test_a_mistake_is_named_with_its_file_and_line(tmp_path, name, packed):
    ending, content, line, complaint = MISTAKES[name]
    file = tmp_path / f"train{ending}{packed}"
    file.write_bytes(PACK[packed](content))
    with pytest.raises(UserError, match=complaint) as caught:
        list(texts_of(file, "text"))
    assert str(caught.value).startswith(f"{file}, line {line}")
    assert "\n" not in str(caught.value)


def test_a_mistake_in_a_folder_of_ones_own_ends_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("runners.base_model.load.load_base", None)
    rows = io.StringIO()
    csv.writer(rows).writerows([["text"], *([f"some text {n}"] for n in range(60))])
    (tmp_path / "mine.csv").write_text(rows.getvalue() + "more, than one\n")
    words = [f"data={tmp_path}", "tracking=off", "budget.seq_len=16", "eval.tasks=[]"]
    with pytest.raises(UserError, match=r"mine\.csv, line 62: no CSV"):
        prepare(words, "sweep")
    (tmp_path / "mine.csv").write_text(rows.getvalue())
    assert prepare(words, "sweep")[:2] == ["data=files", f"data.dir={tmp_path}"]


def test_an_ending_tells_the_format():
    assert ending_of(Path("a.b.jsonl.gz")) == ".jsonl.gz"
    assert ending_of(Path("a.parquet")) == ".parquet"
    assert ending_of(Path("a.parquet.gz")) == ending_of(Path("jsonl")) == ""
