"""Arguments are checked, rewritten and expanded before Hydra runs anything."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

from analysis import cli
from runners import routed_lm
from runners.errors import UserError
from runners.launching.command_line import launch, prepare
from runners.launching.points import CommandLine, parse, split_flags
from runners.point_config import CONF, resolve
from runners.runtime import workers
from tests.conftest import ROOT


def test_flags_are_told_from_overrides():
    flags, words = split_flags(["sparsity=0.3", "-m", "--config-dir", "else", "seed=1"])
    assert flags == ["-m", "--config-dir", "else"]
    assert words == ["sparsity=0.3", "seed=1"]


def test_points_are_the_cartesian_product():
    words = ["model=tiny", "sparsity=0.3,0.5", "seed=0,1,2", "mode=masked", "-m"]
    found = [(p["sparsity"], p["seed"], p["mode"]) for p in CommandLine(words, "sweep").points()]
    assert found == list(itertools.product((0.3, 0.5), range(3), ["masked"]))


def test_every_point_of_an_experiment_is_there():
    """Its sweep stands in a YAML file; a word of the command takes the place of its own."""
    line = CommandLine(["experiment=two_by_two", "sparsity=0.2,0.9", "-m"], "sweep")
    found = [(p["method"]["name"], p["method"]["bypass"], p["sparsity"]) for p in line.points()]
    expected = itertools.product(("informed", "greedy"), ("skip", "forecast"), (0.2, 0.9))
    assert found == list(expected)
    with pytest.raises(UserError, match="sparsity"):
        prepare(["experiment=two_by_two", "sparsity=0.2,1.9"], "sweep")


@pytest.mark.parametrize(
    "words",
    [
        ["method=layer_skip,informed", "seed=1,2", "+method.note=3", "-m"],
        ["experiment=kv", "method.rank=8", "seed=4", "-m"],
        ["method=layer_skip", "seed=3", "~merge_lora"],
    ],
)
def test_points_are_composed_as_hydra_composes_each(words):
    """Their files are read once; an option may change what a file refers to (`seed`)."""
    line = CommandLine(["tracking=off", *words], "sweep")
    presets = parse([f"{key}={value}" for key, value in line.presets.items()])
    (batch,) = BasicSweeper.split_arguments([*presets, *line.overrides], None)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        expected = [resolve(compose("sweep", point)) for point in batch]
    assert list(line.points()) == expected


def test_the_budget_experiment_trains_everything_longer():
    points = list(CommandLine(["experiment=budget", "method=informed,mod", "-m"], "sweep").points())
    found = [(p["method"]["name"], p["budget"]["scale"], p["sparsity"]) for p in points]
    assert found == list(itertools.product(("informed", "mod"), (1, 4, 16), [0.25]))


def test_an_option_that_the_default_of_a_swept_group_lacks():
    words = ["-m", "model=tiny", "method=hero,flexidepth", "method.first_layer=0"]
    given = prepare(words, "sweep")
    assert given == [*words[:3], "method.first_layer=choice(0)"]
    assert [p["method"]["first_layer"] for p in CommandLine(given, "sweep").points()] == [0, 0]


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
        ("method=nope", "unknown method 'nope'; known: .*d_llm, .*dense, "),
        ("method=dense,nope", "unknown method 'nope'"),
        ("model=nope", "unknown model 'nope'"),
        ("model=tiny,owner/name", "separately"),
        ("data=nope", "unknown data 'nope'; known: files, .*, or give a folder"),
        ("data=sotu,./text", "conf/data and over a folder separately"),
        ("data=./nope", "data.dir=./nope is not a folder"),
        ("tracking=everything", "unknown tracking"),
        ("sparsty=0.3", "sparsty"),
        ("sparsity=[", "cannot read"),
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


def test_a_stored_configuration_is_a_primary_config(tmp_path):
    """The report's command for a point again: `--config-dir <point> --config-name config`."""
    (stored,) = CommandLine(["model=tiny", "method=dense", "tracking=off"], "sweep").points()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(stored))
    words = ["--config-dir", str(tmp_path), "--config-name", "config", "results_dir=reproduced"]
    (again,) = CommandLine(words, "sweep").points()
    assert again == {**stored, "results_dir": "reproduced"}


@pytest.mark.parametrize("flag", [["--cfg", "job"], ["--help"], ["--info", "config"], ["-m"]])
def test_no_message_tells_how_to_make_a_typo_run(flag, monkeypatch, capsys):
    """Hydra's own does: `To append to your config use +sparcity=0.3`."""
    monkeypatch.setattr(sys, "argv", ["sweep.py", *flag, "sparcity=0.3"])
    with pytest.raises(SystemExit) as ended:
        launch(lambda: pytest.fail("it ran"), "sweep")
    assert ended.value.code == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "did you mean sparsity?" in said and "+sparcity" not in said


def test_the_version_is_the_projects(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["any.py", "--version"])
    launch(lambda: pytest.fail("it ran"), "sweep")
    cli.run_main(lambda arguments: pytest.fail("it ran"), None)
    routed_lm.main()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert capsys.readouterr().out == f"routebench {project['version']}\n" * 3


COMPLETED = [
    ("python runners/sweep.py method=inf", {"method=informed", "method=informed_plus"}),
    ("python3 ./runners/speed.py -m sparsity=0.3 speed.de", {"speed.decisions=", "speed.decode."}),
    ("VENV/python runners/plan.py budget.rou", {"budget.routers."}),
    ("python runners/sweep.py model=./do", {"model=./docs"}),
    ("python analysis/report.py res", set()),
    ("python setup.py res", set()),
]


def test_completion_in_bash():
    """What a user evaluates, and the words that the Tab key then finds; other scripts never run."""
    bin_folder = Path(sys.executable).parent
    install = f"{sys.executable} runners/sweep.py --shell-completion install=bash"
    lines = [f'eval "$({install})"', "complete -p python >/dev/null || exit 1"]
    for typed, _ in COMPLETED:
        words = typed.replace("VENV", str(bin_folder))
        lines += [f"COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))", "_routebench"]
        lines += ['echo "${COMPREPLY[@]}"']
    path = f"{bin_folder}:/usr/bin:/bin"
    done = subprocess.run(
        ["bash", "-c", "\n".join(lines)],
        cwd=ROOT,
        env={"PATH": path, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    for (typed, wanted), found in zip(COMPLETED, done.stdout.splitlines(), strict=True):
        assert wanted <= set(found.split()) if wanted else not found, typed
