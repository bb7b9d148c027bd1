"""Points in other processes: the records of a serial sweep, shared stages made once."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from importlib.util import find_spec
from typing import Any

import pytest

from runners.launching import points
from runners.launching.command_line import launch
from runners.launching.points import LAUNCHERS
from tests.conftest import Commands, documents
from tests.runners.survival import events, leftovers, outcome

RECIPE = ("method=informed", "method.rank=4", "sparsity=0.3,0.5")
TWO_AT_A_TIME = {
    "joblib": ("hydra.launcher.n_jobs=2",),
    "submitit_local": (),
    "ray": ("hydra.launcher.workers=2",),
}
needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="pip install ray")
EVERY = [
    "joblib",
    pytest.param("submitit_local", marks=pytest.mark.slow),
    pytest.param("ray", marks=[pytest.mark.slow, needs_ray]),
]


@pytest.fixture(scope="module")
def serial(tmp_path_factory, nursery):
    folder = tmp_path_factory.mktemp("serial")
    commands = Commands(folder, folder / "results", folder / "cache", nursery)
    assert commands.run("sweep", *RECIPE, "-m").code == 0
    return apart(outcome(commands))


def apart(found: dict[str, dict[str, Any]]) -> tuple[dict[str, Any], list[Any]]:
    """Points without their curves, and all curves: who runs a shared stage logs its steps."""
    curves = [point.pop("curve") for point in found.values()]
    return found, sorted(curves)


@pytest.mark.parametrize("launcher", EVERY)
def test_records_are_those_of_a_serial_sweep(shell, serial, launcher):
    words = (f"hydra/launcher={launcher}", *TWO_AT_A_TIME[launcher])
    done = shell.run("sweep", *RECIPE, *words, "-m")
    assert done.code == 0, done.stderr
    assert apart(outcome(shell)) == serial
    ran: dict[str, list[bool]] = {}
    for file in shell.results.glob("*/result.json"):
        for stage in json.loads(file.read_bytes())["stages"]:
            ran.setdefault(stage["name"], []).append(stage["cached"])
    calibrated = ran.pop("calibrate")
    assert calibrated == [False, False]
    assert set(map(tuple, map(sorted, ran.values()))) == {(False, True)}, ran


@pytest.mark.slow
@pytest.mark.parametrize("launcher", EVERY)
def test_a_failed_point_is_told_by_the_sweep(shell, launcher):
    words = (f"hydra/launcher={launcher}", *TWO_AT_A_TIME[launcher])
    done = shell.run("sweep", "method=mod", "sparsity=0.3,0.7", *words, "-m")
    assert done.code == 1
    assert "sparsity 0.7 is out of reach" in done.stderr
    records = [json.loads(f.read_bytes()) for f in shell.results.glob("*/result.json")]
    assert sorted(record.get("status") for record in records) == ["complete", "failed"], records


LONG = (
    *("method=router_tuning", "sparsity=0.2", "seed=0,1,2", "checkpoint_seconds=null"),
    "budget.routers={steps:500,batch_size:2,seq_len:32,accumulate:1}",
)
"""Long beside what one worker may begin later than another: some seconds where cores are shared."""
WITHIN_S = 25
"""A few seconds do on a machine with nothing else to run."""


def running(commands: Commands) -> int:
    """Points that are in their gradient stage."""
    return sum(len(events(folder, "step")) > 8 for folder in commands.results.glob("*"))


@pytest.fixture(scope="module")
def three(tmp_path_factory, nursery):
    """The words of three points that share nothing, and what they come to undisturbed."""
    folder = tmp_path_factory.mktemp("three")
    lines = (json.dumps({"text": document.text}) for document in documents(60))
    (folder / "train.jsonl").write_text("\n".join(lines))
    words = (*LONG, "data=files", f"data.dir={folder}", "++data.documents_limit=null")
    commands = Commands(folder, folder / "results", folder / "cache", nursery)
    done = commands.run("sweep", *words, "-m")
    assert done.code == 0, done.stdout + done.stderr
    return words, outcome(commands)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "number"),
    [
        ("joblib", signal.SIGTERM),
        ("joblib", signal.SIGINT),
        pytest.param("ray", signal.SIGTERM, marks=needs_ray),
    ],
)
def test_a_signal_to_the_sweep_ends_its_points_with_a_checkpoint(shell, three, launcher, number):
    """As a scheduler sends it, to the sweep's own process: nothing is lost, nobody is left."""
    own, undisturbed = three
    words = (*own, f"hydra/launcher={launcher}", *TWO_AT_A_TIME[launcher], "-m")
    process = shell.start("sweep", *words)
    while running(shell) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(WITHIN_S) == 128 + number
    statuses = [json.loads(f.read_bytes()) for f in shell.results.glob("*/status.json")]
    assert [status["state"] for status in statuses] == ["interrupted"] * 2, "the third never began"
    assert len(list(shell.cache.glob("stages/*.checkpoint"))) == 2
    for status in statuses:
        with pytest.raises(ProcessLookupError):
            os.kill(status["pid"], 0)

    again = shell.run("sweep", *words)
    assert again.code == 0, again.stderr
    assert (again.stdout + again.stderr).count("goes on after step") == 2
    assert outcome(shell) == undisturbed
    assert leftovers(shell.cache) == []


@pytest.mark.parametrize("word", ["hydra/launcher=slurm", "hydra/launcher=joblib,ray"])
def test_an_unknown_launcher_is_one_line(commands, word):
    done = commands.run("sweep", "sparsity=0.3", word, "-m")
    assert done.code == 2
    assert len(done.error_lines) == 1 and "known: basic, joblib" in done.error_lines[0]


@pytest.mark.parametrize(
    ("launcher", "package"),
    [
        ("joblib", "hydra-joblib-launcher"),
        ("submitit_slurm", "hydra-submitit-launcher"),
        ("ray", "ray"),
    ],
)
def test_a_launcher_that_is_not_installed_is_one_line(monkeypatch, capsys, launcher, package):
    """Exit code 2, before Hydra begins."""
    module, _ = LAUNCHERS[launcher]
    monkeypatch.setattr(points, "find_spec", lambda name: None if name == module else name)
    words = ["sweep.py", "method=random", f"hydra/launcher={launcher}", "tracking=off", "-m"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        launch(lambda: pytest.fail("Hydra has begun"), "sweep")
    assert ended.value.code == 2
    expected = f"error: hydra/launcher={launcher} needs {package}: pip install {package}\n"
    assert capsys.readouterr().err == expected
