"""Local files of every form give the same text, a part at a time; mistakes are one line."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from runners.corpus.formats import LONGEST, texts_of
from runners.corpus.source import check_source, files_of, load_documents, local_files
from runners.errors import UserError
from runners.launching.command_line import prepare
from runners.point_config import DataConfig

TEXTS = [f"text {number} \u00e9\u2028" for number in range(40)]
LINES = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS)).encode()
WRITE = {
    "jsonl": lambda path: path.write_bytes(LINES),
    "jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES)),
    "jsonl.zst": lambda path: path.write_bytes(pa.Codec("zstd").compress(LINES, asbytes=True)),
    "parquet": lambda path: table(path, TEXTS, 7),
}


def table(path: Path, texts, rows: int) -> None:
    """The texts beside another column, in row groups of `rows`."""
    content = pa.table({"id": list(range(len(texts))), "text": texts})
    parquet.write_table(content, path, row_group_size=rows, compression="none")


@pytest.mark.parametrize("ending", WRITE)
def test_every_form_gives_the_same(tmp_path, ending):
    WRITE[ending](tmp_path / f"train.{ending}")
    data = DataConfig(dir=str(tmp_path), shuffle_buffer=0)
    check_source(data)
    found = load_documents(data, "train")
    assert [d.text for d in found] == [t for i, t in enumerate(TEXTS) if i % 20 not in (1, 2)]
    assert found[0].name == "train-1"


def test_shards_are_in_the_order_of_their_names(tmp_path, monkeypatch):
    """Whatever order the file system lists them in, and whatever their form."""
    for number, ending in zip((3, 1, 2, 0), itertools.cycle(WRITE), strict=False):
        WRITE[ending](tmp_path / f"train-{number:05}-of-00004.{ending}")
    (tmp_path / "training.jsonl").write_text("another file")
    listed, glob = files_of(tmp_path, "train"), Path.glob
    assert [file.name[6:11] for file in listed] == ["00000", "00001", "00002", "00003"]
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [*glob(self, pattern)][::-1])
    assert files_of(tmp_path, "train") == listed


def test_parquet_is_read_row_group_by_row_group(tmp_path):
    """Bytes of the third group are destroyed; the first two are read, and checked, all the same."""
    file = tmp_path / "train.parquet"
    table(file, [f"text {n} " + "x" * 100 for n in range(30)], 10)
    meta = parquet.ParquetFile(file).metadata
    column = meta.row_group(2).column(1)
    start = column.dictionary_page_offset or column.data_page_offset
    content = bytearray(file.read_bytes())
    content[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    file.write_bytes(content)
    check_source(DataConfig(dir=str(tmp_path)))
    assert len(list(itertools.islice(texts_of(file, "text"), 20))) == 20
    with pytest.raises(UserError, match=r"train\.parquet cannot be read as Parquet: ") as caught:
        list(texts_of(file, "text"))
    assert "\n" not in str(caught.value)


def test_only_the_text_of_one_row_group_is_in_memory(tmp_path):
    """64 MB in 32 row groups, half of it another column; a few rows take a few MB."""
    rows, size = 32, 2**20
    content = pa.table({"other": ["y" * size] * rows, "text": ["x" * size] * rows})
    file = tmp_path / "train.parquet"
    options = {"row_group_size": 1, "compression": "none", "use_dictionary": False}
    parquet.write_table(content, file, **options)
    del content
    before, most = pa.total_allocated_bytes(), 0
    for _ in texts_of(file, "text"):
        most = max(most, pa.total_allocated_bytes() - before)
    assert most < 8 * size
    assert file.stat().st_size > 60 * size


LINE = {
    b"not json": "no JSON",
    b"\xff\xfe{": "no JSON",
    b"[1]": "no JSON object with a field 'text'",
    b'{"other": 1, "b": 2}': "has no column 'text' but 'other', 'b'",
    b'{"text": null}': "holds no text but a NoneType",
    b'{"text": 3}': "holds no text but a int",
}


@pytest.mark.parametrize("line", LINE)
@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz"])
def test_a_bad_line_is_named(tmp_path, line, ending):
    content = b'{"text": "fine"}\n\n' + line + b"\n"
    packed = gzip.compress(content) if ending.endswith("gz") else content
    (tmp_path / f"test.{ending}").write_bytes(packed)
    with pytest.raises(UserError, match=rf"test\.{ending}, line 3.*{LINE[line]}") as caught:
        load_documents(DataConfig(dir=str(tmp_path)), "test")
    assert "\n" not in str(caught.value)


def test_values_and_columns_that_are_no_text(tmp_path):
    parquet.write_table(pa.table({"text": ["a", None]}), tmp_path / "train.parquet")
    with pytest.raises(UserError, match="row 2 holds no text but a NoneType"):
        load_documents(DataConfig(dir=str(tmp_path)), "train")
    parquet.write_table(pa.table({"text": [1, 2]}), tmp_path / "train.parquet")
    with pytest.raises(UserError, match="row 1 holds no text but a int"):
        check_source(DataConfig(dir=str(tmp_path)))


BROKEN = {
    "train.parquet": (b"PAR1 torn off", "cannot be read as Parquet"),
    "train-1.jsonl.gz": (gzip.compress(LINES)[:40], "cannot be read as JSON Lines"),
    "train.jsonl.zst": (LINES, "cannot be read as JSON Lines"),
    "train.jsonl": (b'{"content": "a", "n": 1}\n', "has no column 'text' but 'content', 'n'"),
    "validation.jsonl": (LINES, r"holds no train\.jsonl and no train-\*"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_sweep_says_so_before_a_model_is_loaded(tmp_path, name, monkeypatch):
    """Hydra has not begun; of a good file, only its schema or first line was read."""
    monkeypatch.setattr("runners.base_model.load.load_base", None)
    content, complaint = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=complaint) as caught:
        prepare(["data=files", f"data.dir={tmp_path}", "tracking=off"], "sweep")
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_missing_column_names_those_that_there_are(tmp_path):
    table(tmp_path / "train-00000-of-00001.parquet", TEXTS, 7)
    words = ["data=files", f"data.dir={tmp_path}", "data.text_field=content", "tracking=off"]
    with pytest.raises(UserError, match=r"no column 'content' but 'id', 'text' \(data\.text_field"):
        prepare(words, "sweep")
    small = ["tracking=off", "budget.seq_len=16", "eval.tasks=[]"]
    assert prepare([*words[:2], *small], "sweep")


def lines(path: Path, texts) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


LATE = {
    "no JSON": ("train", [b"no json"], [], r"train\.jsonl, line 61: no JSON"),
    "half a pair": ("test", [b'{"text": "\\ud800"}'], [], r"test\.jsonl, line 61 .*surrogates"),
    "nested": ("test", [b"[" * 10**5], [], r"test\.jsonl, line 61: no JSON"),
    "documents": ("test", [], [], "continuation_choice needs 4 test documents, found 0"),
    "tokens": ("test", [], ["budget.seq_len=9999"], "train text has too few tokens .* of 9999"),
}


@pytest.mark.parametrize("name", LATE)
def test_what_only_reading_on_would_find_is_found_before_a_model_is_loaded(tmp_path, name):
    """Short documents, of which a point reads all sixty and what follows them."""
    split, rest, more, complaint = LATE[name]
    for each in ("train", "calibration", "test"):
        lines(tmp_path / f"{each}.jsonl", [f"{each} text {n}" for n in range(60)])
    with (tmp_path / f"{split}.jsonl").open("ab") as file:
        file.writelines(rest)
    words = ["data=files", f"data.dir={tmp_path}", "tracking=off", "budget.seq_len=16", *more]
    with pytest.raises(UserError, match=complaint) as caught:
        prepare(words, "sweep")
    assert "\n" not in str(caught.value)


def test_a_clone_of_the_hub_is_read_as_it_is(tmp_path):
    """Its card and settings beside `data`, where the shards of each split are."""
    (tmp_path / "README.md").write_text("license: mit")
    (tmp_path / "data").mkdir()
    texts = {name: [f"{name} {n}" for n in range(4)] for name in ("train", "validation", "test")}
    for name, found in texts.items():
        for shard in (0, 1):
            part = found[2 * shard : 2 * shard + 2]
            table(tmp_path / "data" / f"{name}-{shard:05}-of-00002.parquet", part, 7)
    data = DataConfig(dir=str(tmp_path), shuffle_buffer=0)
    for split, name in (("train", "train"), ("calibration", "validation"), ("test", "test")):
        found = [d.text for d in load_documents(data, split)]
        assert found == [texts[name][n] for n in (0, 2, 1, 3)], "of two shards in turn"
    assert len(local_files(data)) == 6
    assert "data/train-00000-of-00002.parquet" in local_files(data)


def test_a_folder_of_each_split(tmp_path):
    """Files of one name in two of them are two files."""
    for name in ("train", "validation", "test"):
        (tmp_path / name).mkdir()
        for letter in "ab":
            (tmp_path / name / f"{letter}.txt").write_text(f"{name} {letter}")
    data = DataConfig(dir=str(tmp_path), shuffle_buffer=0)
    found = [d.text for d in load_documents(data, "calibration")]
    assert found == ["validation a", "validation b"]
    assert len(local_files(data)) == 6


def test_files_of_any_name_are_training_text(tmp_path, caplog):
    """Three are enough for all splits; hidden files are none, nor are those of another ending."""
    caplog.set_level("INFO")
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"text {name}")
    for name in (".hidden.txt", "notes.md"):
        (tmp_path / name).write_text("no text of ours")
    data = DataConfig(dir=str(tmp_path), shuffle_buffer=0)
    found = [[d.text for d in load_documents(data, s)] for s in ("train", "calibration", "test")]
    assert found == [["text a"], ["text b"], ["text c"]]
    assert [r.message for r in caplog.records] == [
        f"{tmp_path}: no file is named after a split: all 3 are train's"
    ]


def test_a_validation_file_calibrates_and_what_is_not_read_is_named(tmp_path, caplog):
    for name in ("train", "validation", "training", "test-1"):
        lines(tmp_path / f"{name}.jsonl", [f"{name} {n}" for n in range(30)])
    data = DataConfig(dir=str(tmp_path), shuffle_buffer=0)
    found = [d.text for d in load_documents(data, "calibration")]
    assert found == [f"validation {n}" for n in range(30)]
    assert len(load_documents(data, "train")) == 30
    assert [record.message for record in caplog.records] == [
        f"{tmp_path}: not read: training.jsonl"
    ]
    lines(tmp_path / "calibration.jsonl", ["own"])
    assert [d.text for d in load_documents(data, "calibration")] == ["own"]


def test_a_document_is_cut_before_anything_tokenises_it(tmp_path, caplog):
    lines(tmp_path / "train.jsonl", ["row"])
    lines(tmp_path / "test.jsonl", ["short", "x" * (LONGEST + 5)])
    found = load_documents(DataConfig(dir=str(tmp_path)), "test")
    assert [len(document.text) for document in found] == [5, LONGEST]
    said = caplog.records[-1].message
    assert said.startswith(f"{tmp_path / 'test.jsonl'}, line 2: of {LONGEST + 5} characters")


@pytest.mark.parametrize("word", ["documents_limit=0", "documents_limit=a", "shuffle_buffer=-1"])
def test_numbers_are_checked(tmp_path, word):
    table(tmp_path / "train.parquet", TEXTS, 7)
    with pytest.raises(UserError, match=r"data\.[a-z]+_[a-z]+ must be"):
        prepare(["data=files", f"data.dir={tmp_path}", f"data.{word}"], "sweep")
