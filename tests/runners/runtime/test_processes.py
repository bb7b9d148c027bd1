"""Processes that train one point together: the losses of one process, and one that writes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import cache

import pytest

from runners.errors import UserError
from runners.launching.command_line import prepare
from tests.conftest import ROOT, Commands
from tests.runners.survival import RECIPE, events, numbers

QUIET = {
    "informed": (
        *(word for word in RECIPE if "lora" not in word),
        *("method.train=none", "method.lora={rank: 2, alpha: 4, dropout: 0.0, targets: [q, v]}"),
        "sparsity=0.4",
    ),
    "router_tuning": ("method=router_tuning_published", "method.training.lr=1e-3", "sparsity=0.2"),
}
"""Recipes that draw no noise, which differs from process to process: unit-wise regression and
hard decisions, and soft decisions under a penalty that bends."""
WORDS = QUIET["informed"]
CASES = [
    ("ddp", "router_tuning"),
    pytest.param("ddp", "informed", marks=pytest.mark.slow),
    pytest.param("fsdp", "informed", marks=pytest.mark.slow),
]
CLOSE = {"rel": 1e-5, "abs": 1e-5}
WITHIN_S = 30


def launched(commands: Commands, kind: str, *words: str) -> subprocess.Popen[str]:
    """`accelerate launch --config_file conf/accelerate/<kind>.yaml runners/sweep.py <words>`."""
    config = ROOT / "conf" / "accelerate" / f"{kind}.yaml"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(
        [*launcher, *commands.line("sweep", *words)[1:]],
        cwd=commands.folder,
        env=commands.environment(CUDA_VISIBLE_DEVICES="", TMPDIR=str(commands.folder)),
        text=True,
        **pipes,  # type: ignore[call-overload]
    )


def figures(value):
    """Record figures as floats to compare, by path."""
    if isinstance(value, dict):
        return {f"{k}/{p}": v for k, item in value.items() for p, v in figures(item).items()}
    if isinstance(value, list):
        return {f"{i}/{p}": v for i, item in enumerate(value) for p, v in figures(item).items()}
    return {"": value} if isinstance(value, float) else {}


def point(commands: Commands):
    """(record, {(stage, step): loss}) of the only point."""
    (folder,) = commands.results.iterdir()
    losses = {(e["stage"], e["step"]): e["loss"] for e in events(folder, "step")}
    return json.loads((folder / "result.json").read_bytes()), losses


@pytest.fixture(scope="module")
def alone(tmp_path_factory, nursery):
    """What a recipe comes to in one process."""

    @cache
    def run(recipe):
        folder = tmp_path_factory.mktemp("alone")
        commands = Commands(folder, folder / "results", folder / "cache", nursery)
        done = commands.run("sweep", *QUIET[recipe])
        assert done.code == 0, done.stderr
        return point(commands)

    return run


@pytest.mark.parametrize(("kind", "recipe"), CASES)
def test_losses_are_those_of_one_process(commands, alone, kind, recipe):
    single = alone(recipe)
    process = launched(commands, kind, *QUIET[recipe])
    said, _ = process.communicate(timeout=170)
    assert process.returncode == 0, said
    record, losses = point(commands)
    assert losses and losses.keys() == single[1].keys()
    assert losses == pytest.approx(single[1], **CLOSE)
    assert record["identity"]["processes"] == 2 and single[0]["identity"]["processes"] == 1
    found, expected = figures(numbers(record)), figures(numbers(single[0]))
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-3)
    assert ("sharded over 2 processes" in said) == (kind == "fsdp")
    assert not list(commands.folder.glob("routebench-*")), "scratch of the second process"
    assert said.count(": starting in") == 1, "only one process tells"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_sweep_that_is_stopped_goes_on(commands, alone, kind):
    single = alone("informed")
    words = (*WORDS, "checkpoint_seconds=0")
    process = launched(commands, kind, *words)
    while not list(commands.results.glob("*/log.jsonl")) or not any(
        e["stage"].startswith("lora") for p in commands.results.iterdir() for e in events(p, "step")
    ):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode != 0 and time.monotonic() - began < WITHIN_S
    process = launched(commands, kind, *words)
    said, _ = process.communicate(timeout=170)
    assert process.returncode == 0, said
    _, losses = point(commands)
    assert losses == pytest.approx(single[1], **CLOSE)


@pytest.mark.slow
def test_a_failed_point_ends_all_processes(commands):
    process = launched(commands, "ddp", "method=d_llm", "sparsity=0.3,0.48", "-m")
    said, _ = process.communicate(timeout=170)
    assert process.returncode == 1
    assert "is out of reach: this method routes" in said


def test_a_batch_that_cannot_be_shared_is_refused(monkeypatch):
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "3")
    words = ["model=tiny", "tracking=off", "budget.routers.batch_size=2"]
    with pytest.raises(UserError, match=r"routers\.batch_size=2 has less than a row .* 3 proc"):
        prepare(words, "sweep")


def test_points_are_not_spread_by_two_launchers_at_once(monkeypatch):
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    with pytest.raises(UserError, match="share every point"):
        prepare(["model=tiny", "tracking=off", "hydra/launcher=joblib", "-m"], "sweep")


def test_speed_is_measured_in_one_process(commands):
    done = commands.run("speed", "method=random", WORLD_SIZE="2", RANK="0")
    assert done.code == 1 and "speed is measured in one process" in done.stderr + done.stdout


def test_a_sweep_that_times_itself_runs_in_one_process(monkeypatch):
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    with pytest.raises(UserError, match="speed is measured in one process: leave speed=sweep out"):
        batches = [f"budget.{stage}.batch_size=2" for stage in ("routers", "lora", "forecasters")]
        prepare(["model=tiny", "tracking=off", "speed=sweep", *batches], "sweep")
