"""Arguments are checked, rewritten and expanded before Hydra runs anything."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from runners.errors import UserError
from runners.launching.command_line import launch, points, prepare, split_flags
from runners.runtime import workers
from tests.conftest import ROOT


def parse(*words):
    return OverridesParser.create().parse_overrides(list(words))


def test_flags_are_told_from_overrides():
    flags, words = split_flags(["sparsity=0.3", "-m", "--config-dir", "else", "seed=1"])
    assert flags == ["-m", "--config-dir", "else"]
    assert words == ["sparsity=0.3", "seed=1"]


def test_points_are_the_cartesian_product():
    found = list(points(parse("sparsity=0.3,0.5", "seed=0,1,2", "mode=masked")))
    expected = [
        [f"sparsity={s}", f"seed={k}", "mode=masked"]
        for s, k in itertools.product(("0.3", "0.5"), range(3))
    ]
    assert found == expected


def test_the_last_point_of_a_sweep_is_checked_too():
    with pytest.raises(UserError, match=r"1\.2"):
        prepare(["model=tiny", "seed=0,1", "sparsity=0.3,0.5,1.2", "-m"], "sweep")


def test_several_values_need_multirun():
    with pytest.raises(UserError, match="need -m"):
        prepare(["model=tiny", "sparsity=0.3,0.5"], "sweep")


def test_words_come_back_unchanged():
    words = ["-m", "model=tiny", "sparsity=0.3,0.5", "tracking=off"]
    assert prepare(words, "sweep") == words


def test_a_hub_id_is_rewritten():
    words = prepare(["model=owner/name", "sparsity=0.3"], "sweep")
    assert words == ["model=pretrained", "model.path=owner/name", "sparsity=0.3"]


def test_several_folders_are_swept(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "llama"}))
    words = prepare([f"model={tmp_path / 'a'},{tmp_path / 'b'}", "-m"], "sweep")
    assert words[1:] == ["model=pretrained", f"model.path={tmp_path / 'a'},{tmp_path / 'b'}"]


@pytest.mark.parametrize(
    ("word", "complaint"),
    [
        ("method=nope", "unknown method 'nope'; known: d_llm, dense, "),
        ("method=dense,nope", "unknown method 'nope'"),
        ("model=nope", "unknown model 'nope'"),
        ("model=tiny,owner/name", "separately"),
        ("tracking=everything", "unknown tracking"),
        ("sparsty=0.3", "sparsty"),
        ("sparsity=[", "input"),
        ("data=files", "dir"),
    ],
)
def test_wrong_word_is_one_line(word, complaint):
    with pytest.raises(UserError, match=complaint) as caught:
        prepare([word, "-m"], "sweep")
    assert "\n" not in str(caught.value)


@pytest.fixture
def argv(monkeypatch):
    monkeypatch.setattr(workers, "failed_points", [])

    def set_words(*words):
        monkeypatch.setattr(sys, "argv", ["sweep.py", *words])

    return set_words


def test_exit_codes(argv, capsys):
    argv("model=tiny", "sparsity=2")
    entered = []
    with pytest.raises(SystemExit) as ended:
        launch(lambda: entered.append(1), "sweep")
    assert ended.value.code == 2
    assert not entered
    assert capsys.readouterr().err == "error: sparsity must be a number in [0, 1), not 2\n"

    argv("model=tiny")
    launch(lambda: entered.append(1), "sweep")
    assert entered == [1]

    with pytest.raises(SystemExit) as ended:
        launch(lambda: workers.note_failure("why"), "sweep")
    assert ended.value.code == 1


def test_checks_load_neither_torch_nor_transformers():
    """They stand before every command: a mistake must not wait for a model's libraries."""
    code = "import sys, runners.launching.command_line, runners.job; print(*sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not {"torch", "transformers", "lm_eval", "datasets", "wandb"} & set(done.stdout.split())
