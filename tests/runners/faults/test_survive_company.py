"""Two sweeps on one folder, and clocks that jump."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SHRUNK, Commands
from tests.nursery import Nursery, Run, Step
from tests.runners.survival import RECIPE, events, leftovers, numbers, outcome

STEPS = "{steps:40,batch_size:2,seq_len:32,accumulate:1}"
WORDS = (*SHRUNK, "tracking=off", *RECIPE, "checkpoint_seconds=0")
WORDS += tuple(f"budget.{stage}={STEPS}" for stage in ("forecasters", "routers"))


def words(folder: Path, targets: str) -> list[str]:
    places = [f"results_dir={folder / 'results'}", f"cache_dir={folder / 'cache'}"]
    return [*WORDS, *places, f"sparsity={targets}", "-m"]


def at(folder: Path) -> Commands:
    return Commands(folder, folder / "results", folder / "cache")


@pytest.fixture(scope="module")
def calm(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calm")
    run = nursery.run(Step(words(folder, "0.3,0.5")))
    assert run.code() == 0, run.said
    return folder


def steps_of(folder: Path) -> Counter[tuple[Any, ...]]:
    """How often each step of each stage was logged, over all points."""
    found = [e for point in folder.glob("results/*") for e in events(point, "step")]
    return Counter((e["stage"], e["step"], e["loss"]) for e in found)


def records(folder: Path) -> dict[str, Any]:
    return {name: {**point, "curve": None} for name, point in outcome(at(folder)).items()}


def wait_for_steps(folder: Path, run: Run, wanted: int) -> None:
    while sum(steps_of(folder).values()) < wanted:
        assert run.running(), run.said
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.parametrize("targets", ["0.3,0.5", "0.5,0.3"])
def test_one_of_two_sweeps_is_killed(nursery, calm, tmp_path, targets):
    """They work on the same points, or on one each with the same stages to do first."""
    (first,) = nursery.start(Step(words(tmp_path, "0.3,0.5")))
    (second,) = nursery.start(Step(words(tmp_path, targets)))
    wait_for_steps(tmp_path, first, 30)
    first.kill()
    assert first.code() == -9
    assert second.code() == 0, second.said
    assert records(tmp_path) == records(calm)
    assert steps_of(tmp_path) == steps_of(calm)
    assert leftovers(tmp_path / "cache") == []


@pytest.mark.slow
def test_two_whole_sweeps_make_everything_once(nursery, calm, tmp_path):
    (first,) = nursery.start(Step(words(tmp_path, "0.3,0.5")))
    (second,) = nursery.start(Step(words(tmp_path, "0.5,0.3")))
    assert (first.code(), second.code()) == (0, 0), first.said + second.said
    assert records(tmp_path) == records(calm)
    assert steps_of(tmp_path) == steps_of(calm)
    said = first.said + second.said
    assert said.count(": starting in ") == 2


def check_times(folder: Path) -> None:
    """No duration of a record is negative, or of hours."""
    for file in folder.glob("results/*/result.json"):
        record = json.loads(file.read_bytes())
        spent = [record["seconds"], *(stage["seconds"] for stage in record["stages"])]
        assert all(0 <= seconds < 600 for seconds in spent)
    for point in folder.glob("results/*"):
        assert all(event["tokens_per_s"] > 0 for event in events(point, "step"))


@pytest.mark.slow
def test_a_clock_that_jumps(nursery, calm, tmp_path):
    """Killed and gone on with under it, so that a checkpoint was written and read too."""
    step = Step(words(tmp_path, "0.3,0.5"), clock=5 * 3600.0)
    (first,) = nursery.start(step)
    wait_for_steps(tmp_path, first, 30)
    first.kill()
    first.code()
    assert list(tmp_path.glob("cache/stages/*.checkpoint"))
    second = nursery.run(step)
    assert second.code() == 0, second.said
    assert outcome(at(tmp_path)) == outcome(at(calm))
    check_times(tmp_path)
    logged = [
        e["unix_time_s"] for point in tmp_path.glob("results/*") for e in events(point, "step")
    ]
    assert max(logged) - min(logged) > 9 * 3600


SHIM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>
static long offset(void) {
    static long looks;
    return (long[]){0, 18000, -18000}[__sync_fetch_and_add(&looks, 1) / 7 % 3];
}
int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int code = real(clock, now);
    if (clock == CLOCK_REALTIME) now->tv_sec += offset();
    return code;
}
int gettimeofday(struct timeval *now, void *zone) {
    static int (*real)(struct timeval *, void *);
    if (!real) real = dlsym(RTLD_NEXT, "gettimeofday");
    int code = real(now, zone);
    now->tv_sec += offset();
    return code;
}
time_t time(time_t *now) {
    static time_t (*real)(time_t *);
    if (!real) real = dlsym(RTLD_NEXT, "time");
    time_t value = real(0) + offset();
    if (now) *now = value;
    return value;
}
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_a_clock_that_jumps_for_every_library(calm, tmp_path):
    """The system's calls themselves, for the whole process and from its start."""
    (tmp_path / "shim.c").write_text(SHIM)
    build = ["cc", "-shared", "-fPIC", "-o", "shim.so", "shim.c", "-ldl"]
    subprocess.run(build, cwd=tmp_path, check=True)
    commands = at(tmp_path)
    own = words(tmp_path, "0.3,0.5")[len(SHRUNK) + 1 :]
    done = commands.run("sweep", *own, LD_PRELOAD=str(tmp_path / "shim.so"))
    assert done.code == 0, done.stdout + done.stderr
    assert numbers(outcome(commands)) == numbers(outcome(at(calm)))
    check_times(tmp_path)
    assert "LD_PRELOAD" not in os.environ
