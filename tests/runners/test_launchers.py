"""Points in other processes: the records of a serial sweep, shared stages made once."""

from __future__ import annotations

import json
from importlib.util import find_spec
from typing import Any

import pytest

from tests.conftest import Commands
from tests.runners.survival import outcome

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
def serial(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serial")
    commands = Commands(folder, folder / "results", folder / "cache")
    assert commands.run("sweep", *RECIPE, "-m").code == 0
    return apart(outcome(commands))


def apart(found: dict[str, dict[str, Any]]) -> tuple[dict[str, Any], list[Any]]:
    """Points without their curves, and all curves: who runs a shared stage logs its steps."""
    curves = [point.pop("curve") for point in found.values()]
    return found, sorted(curves)


@pytest.mark.parametrize("launcher", EVERY)
def test_records_are_those_of_a_serial_sweep(commands, serial, launcher):
    words = (f"hydra/launcher={launcher}", *TWO_AT_A_TIME[launcher])
    done = commands.run("sweep", *RECIPE, *words, "-m")
    assert done.code == 0, done.stderr
    assert apart(outcome(commands)) == serial
    ran: dict[str, list[bool]] = {}
    for file in commands.results.glob("*/result.json"):
        for stage in json.loads(file.read_bytes())["stages"]:
            ran.setdefault(stage["name"], []).append(stage["cached"])
    calibrated = ran.pop("calibrate")
    assert calibrated == [False, False]
    assert set(map(tuple, map(sorted, ran.values()))) == {(False, True)}, ran


@pytest.mark.parametrize("launcher", EVERY)
def test_a_failed_point_is_told_by_the_sweep(commands, launcher):
    words = (f"hydra/launcher={launcher}", *TWO_AT_A_TIME[launcher])
    done = commands.run("sweep", "method=mod", "sparsity=0.3,0.7", *words, "-m")
    assert done.code == 1
    assert "sparsity 0.7 is out of reach" in done.stderr
    records = [json.loads(f.read_bytes()) for f in commands.results.glob("*/result.json")]
    assert sorted(record.get("status") for record in records) == ["complete", "failed"], records


@pytest.mark.parametrize("word", ["hydra/launcher=slurm", "hydra/launcher=joblib,ray"])
def test_an_unknown_launcher_is_one_line(commands, word):
    done = commands.run("sweep", "sparsity=0.3", word, "-m")
    assert done.code == 2
    assert len(done.error_lines) == 1 and "known: basic, joblib" in done.error_lines[0]


def test_a_launcher_that_is_not_installed_is_one_line(monkeypatch):
    from runners import launch
    from runners.errors import UserError

    monkeypatch.setattr(launch, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install hydra-joblib-launcher"):
        launch.prepare(["hydra/launcher=joblib", "-m"], "sweep")
