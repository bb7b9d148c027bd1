"""Ctrl-C and SIGTERM in every phase, and points that failed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runners.runtime.signals import Interrupted, Stop
from tests.conftest import ROOT, SHRUNK, Commands
from tests.nursery import Run, Step
from tests.runners.survival import RECIPE, events, outcome

TINY = (*SHRUNK, "tracking=off", "sparsity=0.4")
STEPS = "{steps:%d,batch_size:2,seq_len:32,accumulate:1}"
LONG = STEPS % 100_000
ALL_TEXT = "++data.documents_limit=null"
PHASES = {
    "stage": (*RECIPE, f"budget.routers={LONG}"),
    "fit": ("method=informed", "method.rank=4", "budget.fit_tokens=400000", ALL_TEXT),
    "evaluation": (
        "method=random",
        ALL_TEXT,
        "eval.perplexity.documents_limit=60",
        "eval.perplexity.tokens_per_document=100000",
    ),
}
WITHIN_S = 20
"""Three seconds would do on a machine with nothing else to run."""


def words(folder: Path, *more: str) -> list[str]:
    return [*TINY, f"results_dir={folder / 'results'}", f"cache_dir={folder / 'cache'}", *more]


def reached(folder: Path, phase: str) -> bool:
    points = list(folder.glob("results/*"))
    stages = [event["name"] for point in points for event in events(point, "stage")]
    if phase == "stage":
        steps = [e for point in points for e in events(point, "step")]
        return sum(step["stage"].startswith("train") for step in steps) > 5
    if phase == "evaluation":
        return "calibrate" in stages
    return bool(list(folder.glob("cache/stages/*.lock")))


def wait_for(folder: Path, phase: str, run: Run) -> None:
    while not reached(folder, phase):
        assert run.running(), run.said
        time.sleep(0.01)
    time.sleep(0.3)


def status(folder: Path) -> str:
    (file,) = folder.glob("results/*/status.json")
    return json.loads(file.read_bytes())["state"]


@pytest.mark.parametrize(
    "phase",
    ["stage", *(pytest.param(p, marks=pytest.mark.slow) for p in ("fit", "evaluation"))],
)
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)],
)
def test_a_run_ends_within_seconds(nursery, tmp_path, phase, number, code):
    (run,) = nursery.start(Step(words(tmp_path, *PHASES[phase])))
    wait_for(tmp_path, phase, run)
    began = time.monotonic()
    run.kill(number)
    assert run.code() == code, run.said
    assert time.monotonic() - began < WITHIN_S
    assert "the same command goes on from here" in run.said
    assert "Traceback" not in run.said
    assert status(tmp_path) == "interrupted"
    assert not list(tmp_path.glob("results/*/result.json"))
    checkpoints = list(tmp_path.glob("cache/stages/*.checkpoint"))
    assert bool(checkpoints) == (phase == "stage")


def test_a_second_interrupt_ends_at_once(nursery, tmp_path):
    """The first waits for the end of the micro-batch, here of seconds."""
    big = "{steps:9,batch_size:64,seq_len:256,accumulate:1}"
    (run,) = nursery.start(Step(words(tmp_path, *RECIPE, f"budget.forecasters={big}")))
    wait_for(tmp_path, "fit", run)
    time.sleep(1)
    run.kill(signal.SIGINT)
    time.sleep(0.2)
    if run.running():
        run.kill(signal.SIGINT)
    assert run.code(WITHIN_S) == 130, run.said


def test_a_second_sigterm_does_not_disturb_the_end():
    """The sweep passes it on, and a scheduler sends its own."""
    stop = Stop()
    with pytest.raises(Interrupted, match="143"):
        stop.receive(signal.SIGTERM)
    stop.receive(signal.SIGTERM)
    with pytest.raises(Interrupted, match="130"):
        stop.receive(signal.SIGINT)


@pytest.mark.slow
def test_stopped_again_and_again_is_the_same_run(nursery, tmp_path):
    """SIGTERM by a scheduler in turn with Ctrl-C; a signal's checkpoint is enough."""
    own = (*RECIPE, f"budget.routers={STEPS % 60}", "checkpoint_seconds=null")
    calm = nursery.run(Step(words(tmp_path / "calm", *own)))
    assert calm.code() == 0, calm.said
    folder = tmp_path / "stopped"
    for number in (signal.SIGTERM, signal.SIGINT):
        (run,) = nursery.start(Step(words(folder, *own)))
        before = sum(len(events(point, "step")) for point in folder.glob("results/*"))
        while sum(len(events(p, "step")) for p in folder.glob("results/*")) < before + 20:
            assert run.running(), run.said
            time.sleep(0.005)
        run.kill(number)
        assert run.code() == 128 + number, run.said
    last = nursery.run(Step(words(folder, *own)))
    assert last.code() == 0, last.said
    assert "goes on after step" in last.said
    both = [outcome(Commands(f, f / "results", f / "cache")) for f in (tmp_path / "calm", folder)]
    assert both[0] == both[1]


def heed_interrupts() -> None:
    """A shell's background job, as these tests may be, ignores SIGINT and hands that down."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_download_that_hangs(tmp_path, number, code):
    """A hub that takes the connection and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as hub:
        url = f"http://127.0.0.1:{hub.getsockname()[1]}"
        more = ("data=redpajama", "method=random")
        command = [sys.executable, str(ROOT / "runners/sweep.py"), *words(tmp_path, *more)]
        own = {"HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hub")}
        env = {**os.environ, "PYTHONPATH": str(ROOT), **own}
        run = subprocess.Popen(
            command,
            cwd=tmp_path,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=heed_interrupts,
        )
        hub.settimeout(120)
        connection, _ = hub.accept()
        began = time.monotonic()
        run.send_signal(number)
        said, _ = run.communicate(timeout=60)
        connection.close()
    assert run.returncode == code, said
    assert time.monotonic() - began < WITHIN_S
    assert "Traceback" not in said


def states(folder: Path) -> dict[float, tuple[str, str | None]]:
    found = {}
    for file in folder.glob("results/*/result.json"):
        record = json.loads(file.read_bytes())
        found[record["sparsity_target"]] = (record["status"], record.get("reason"))
    return found


def test_a_failed_point_is_retried_or_not(nursery, tmp_path):
    """A target out of the method's reach is refused; the sweep goes on to the point after it."""
    own = ("method=mod", "sparsity=0.3,0.7,0.2", "-m")
    first = nursery.run(Step(words(tmp_path, *own)))
    assert first.code() == 1, first.said
    assert [state for state, _ in states(tmp_path).values()].count("complete") == 2
    status, reason = states(tmp_path)[0.7]
    assert status == "failed" and reason
    assert len(first.errors) == 1 and reason in first.errors[0]

    left = nursery.run(Step(words(tmp_path, *own, "retry_failed=false")))
    assert left.code() == 1, left.said
    assert left.said.count(": starting in ") == 0
    assert f"it did before ({reason})" in left.errors[0]
    assert states(tmp_path)[0.7] == ("failed", reason)

    again = nursery.run(Step(words(tmp_path, *own)))
    assert again.code() == 1
    assert again.said.count(": starting in ") == 1
    assert again.said.count("skipped (force=true computes it again)") == 2


def test_a_point_that_failed_for_want_of_room_completes(nursery, tmp_path):
    own = words(tmp_path, "method=random")
    full = nursery.run(Step(own, file_bytes=2000))
    assert full.code() == 1
    assert len(full.errors) == 1 and "no space left" in full.errors[0]
    assert "Traceback" not in full.said
    (record,) = (json.loads(file.read_bytes()) for file in tmp_path.glob("results/*/result.json"))
    assert record["status"] == "failed" and "no space left" in record["reason"]
    assert nursery.run(Step(own)).code() == 0
    assert nursery.run(Step([*own, "retry_failed=false"])).code() == 0
