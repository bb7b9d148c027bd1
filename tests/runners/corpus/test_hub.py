"""Data sets of the hub, by `datasets` itself on a local folder; what it refuses is one line."""

from __future__ import annotations

import itertools
import json

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from runners.corpus.source import SPLITS, _hub_split, check_source, load_documents
from runners.errors import UserError
from runners.point_config import DataConfig


@pytest.fixture(autouse=True)
def _forget():
    _hub_split.cache_clear()
    yield
    _hub_split.cache_clear()


@pytest.fixture
def folder(tmp_path):
    """A data set of three shards of 40 rows, and a split of its own for validation."""
    path = tmp_path / "set"
    path.mkdir()
    for shard in range(3):
        content = {"n": list(range(40)), "text": [f"shard {shard} row {n}" for n in range(40)]}
        parquet.write_table(pa.table(content), path / f"train-{shard:05}-of-00003.parquet")
    parquet.write_table(pa.table({"n": [1], "text": ["held out"]}), path / "validation.parquet")
    return path


def read(path, split, *, seed=0, enough=None, **options):
    shared = dict.fromkeys(SPLITS, "train")
    options = {"splits": shared, "shuffle_buffer": 50, **options}
    data = DataConfig(source="hub", path=str(path), **options)
    return load_documents(data, split, seed=seed, enough=enough)


def test_one_split_of_the_hub_serves_all_three(folder):
    found = {split: [d.text for d in read(folder, split)] for split in SPLITS}
    every = [f"shard {shard} row {n}" for shard in range(3) for n in range(40)]
    assert sorted(itertools.chain(*found.values())) == sorted(every)
    assert len(found["calibration"]) == len(found["test"]) == 6
    assert {text[:7] for text in found["train"][:20]} == {"shard 0", "shard 1", "shard 2"}
    assert found["train"] == [d.text for d in read(folder, "train")]
    assert found["train"] != [d.text for d in read(folder, "train", seed=1)]
    assert found["test"] == [d.text for d in read(folder, "test", seed=1)]


def test_splits_of_its_own(folder):
    splits = {"train": "train", "calibration": "validation", "test": "train"}
    assert [d.text for d in read(folder, "calibration", splits=splits)] == ["held out"]
    train = read(folder, "train", splits=splits)
    assert len(train) == 114 and len({d.name for d in train}) == 114


def test_json_lines_are_streamed_too(tmp_path):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in "abcde"))
    assert [d.text for d in read(tmp_path, "train", shuffle_buffer=0)] == ["a", "d", "e"]
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"text": null}\n')
    with pytest.raises(UserError, match="shard 0, row 6 holds no text but a NoneType"):
        read(tmp_path, "train")


def test_no_more_is_streamed_than_is_enough(monkeypatch):
    """A generator that never ends stands for a data set that is too large."""
    taken = []

    def endless(shards):
        for shard in shards:
            for number in itertools.count():
                taken.append(number)
                yield {"text": f"{shard} {number}"}

    rows = datasets.IterableDataset.from_generator(endless, gen_kwargs={"shards": [0, 1, 2, 3]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {"train": rows})
    seen = iter(range(10**6))
    found = read("owner/name", "train", enough=lambda _: next(seen) == 99, shuffle_buffer=20)
    assert len(found) == 100
    assert {d.text[0] for d in found} == set("0123")
    assert len(taken) < 200


MISTAKES = {
    "split": ({"splits": {"test": "dev"}}, r"no split 'dev' but train, validation \(data\.splits="),
    "column": ({"text_field": "content"}, r"no column 'content' but 'n', 'text' \(data\.text_fie"),
    "configuration": ({"config_name": "en"}, "'en' not found. Available: "),
    "path": ({"path": None}, "needs data.path="),
    "folder": ({"path": "/nope/none"}, "cannot read data set /nope/none: "),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line_before_any_text_is_read(folder, name):
    options, complaint = MISTAKES[name]
    splits = dict.fromkeys(SPLITS, "train") | options.pop("splits", {})
    with pytest.raises(UserError, match=complaint) as caught:
        options = {"source": "hub", "path": str(folder), "splits": splits, **options}
        check_source(DataConfig(**options))
    assert "\n" not in str(caught.value)


def test_a_loading_script_is_not_run(tmp_path):
    marker = tmp_path / "ran"
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "old.py").write_text(f"open({str(marker)!r}, 'w')\nimport datasets\n")
    with pytest.raises(UserError, match=r"scripts are no longer supported.*data\.dir="):
        read(tmp_path / "old", "train")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("raised", "complaint"),
    [
        (ConnectionError("Couldn't reach it\nat all"), r"Couldn't reach it at all .*data\.dir="),
        (
            datasets.exceptions.DatasetNotFoundError("no"),
            "owner/name: no .*HF_TOKEN",
        ),
        (TimeoutError(), r"TimeoutError \(.*without a network"),
    ],
)
def test_without_a_network_it_says_what_to_set(monkeypatch, raised, complaint):
    def refuse(*_, **__):
        raise raised

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError, match=complaint) as caught:
        read("owner/name", "train")
    assert "\n" not in str(caught.value)


def test_offline_is_one_line():
    """`datasets` itself, told to use no network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(UserError, match=r"cannot read data set .*HF_HOME to a filled cache"):
            read("routebench-nobody/routebench-nothing", "train")
