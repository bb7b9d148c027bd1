"""The folder for machines without a network, written from local `datasets` sources."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import datasets
import pytest

from runners.base_model.embedded import sha256_of
from runners.errors import UserError
from runners.evaluation.fetching import Wanted, check_fetch, fetch, wanted_files
from runners.launching.check import check_evaluation
from runners.options import parse_section
from runners.point_config import EvalConfig
from tests.conftest import compose_tiny


@dataclass
class Hub:
    """Data sets in memory; keeps what was asked for."""

    asked: list[Wanted] = field(default_factory=list)

    def records(self, wanted: Wanted) -> datasets.Dataset:
        self.asked.append(wanted)
        choices = {"text": ["a"], "label": ["A"]}
        rows = [{"page": f"text {i} \u00e9", "choices": choices} for i in range(9)]
        return datasets.Dataset.from_list(rows)

    def revision(self, wanted: Wanted) -> str:
        return f"commit of {wanted.path} at {wanted.revision}"


REVISIONS = {"baber/piqa": "v1"}


def paper(*words: str) -> EvalConfig:
    return parse_section(EvalConfig, compose_tiny("eval=paper", "eval.limit=null", *words)["eval"])


def test_everything_of_the_paper_protocol_is_written(tmp_path):
    words = "eval.tasks=[wikitext,piqa,boolq,openbookqa,winogrande,hellaswag,arc_easy,gsm8k]"
    hub = Hub()
    written = fetch(paper(words), REVISIONS, tmp_path, hub.records, hub.revision)
    manifest = json.loads(written.read_text())["files"]
    assert set(manifest) == {
        "wikitext2/test.jsonl",
        "piqa/validation.jsonl",
        "boolq/validation.jsonl",
        "openbookqa/test.jsonl",
        "winogrande/validation.jsonl",
        "winogrande/train.jsonl",
        "hellaswag/validation.jsonl",
        "hellaswag/train.jsonl",
        "arc_easy/test.jsonl",
        "arc_easy/train.jsonl",
        "gsm8k/test.jsonl",
        "gsm8k/train.jsonl",
        "ptb/test.jsonl",
        "c4/validation.jsonl",
    }
    for name, entry in manifest.items():
        assert entry["sha256"] == sha256_of(tmp_path / name)
        lines = (tmp_path / name).read_text().splitlines()
        assert json.loads(lines[0])["choices"] == {"text": ["a"], "label": ["A"]}
        assert entry["records"] == len(lines) == 9
    assert manifest["piqa/validation.jsonl"]["revision"] == "commit of baber/piqa at v1"
    assert {w.revision for w in hub.asked if w.path == "baber/piqa"} == {
        "commit of baber/piqa at v1"
    }
    check_evaluation(paper(words, f"eval.data_dir={tmp_path}"))


def test_only_what_changed_is_fetched_again(tmp_path):
    chosen = paper("eval.tasks=[piqa,arc_easy]", "eval.texts=[]", "eval.long_context=null")
    hub = Hub()

    def fetch_again(revisions=REVISIONS):
        fetch(chosen, revisions, tmp_path, hub.records, hub.revision)

    fetch_again()
    assert len(hub.asked) == 3
    fetch_again()
    assert len(hub.asked) == 3
    (tmp_path / "piqa" / "validation.jsonl").write_text("damaged")
    fetch_again()
    assert [w.file for w in hub.asked[3:]] == ["piqa/validation.jsonl"]
    fetch_again({"baber/piqa": "v2"})
    assert [w.file for w in hub.asked[4:]] == ["piqa/validation.jsonl"]


def test_a_part_of_a_text_is_its_first_records(tmp_path, monkeypatch):
    chosen = paper("eval.tasks=[]", "eval.texts=[c4]", "eval.long_context=null")
    (wanted,) = wanted_files(chosen, {})
    assert (wanted.file, wanted.records) == ("c4/validation.jsonl", 1100)
    monkeypatch.setattr(
        "runners.evaluation.fetching.describe_text", lambda name: {**TEXT, "documents": 4}
    )
    hub = Hub()
    manifest = json.loads(fetch(chosen, {}, tmp_path, hub.records, hub.revision).read_text())
    assert manifest["files"]["c4/test.jsonl"]["records"] == 4


TEXT = {
    "split": "test",
    "path": "owner/name",
    "config_name": None,
    "revision": None,
    "data_files": None,
    "optional": False,
}


def test_no_network_is_one_line(tmp_path, commands):
    done = commands.run(
        "fetch", f"out_dir={tmp_path / 'data'}", "eval.tasks=[piqa]", "eval.texts=[]", shrink=False
    )
    assert done.code == 1
    assert done.error_lines[-1].startswith(
        "error: cannot read data set baber/piqa for piqa/validation"
    )
    assert "Traceback" not in done.stderr


def test_mistakes():
    with pytest.raises(UserError, match="unknown task 'nope'"):
        check_fetch(paper("eval.tasks=[nope]"), {})
    with pytest.raises(UserError, match="nothing to fetch"):
        check_fetch(paper("eval.tasks=[agreement]", "eval.texts=[]", "eval.long_context=null"), {})
