"""Busy processes beside a measurement: there while it runs, gone however it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from runners.timing.neighbours import neighbours
from tests.conftest import ROOT

WAITING = """
import json, signal
from runners.runtime.signals import listening
from runners.timing.neighbours import neighbours
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
with listening(), neighbours(2) as started:
    print(json.dumps(started), flush=True)
    signal.pause()
"""


def state(pid: int) -> str:
    """R of a process that runs or waits for a core, Z of one that has ended, or nothing."""
    command = ["ps", "-o", "stat=", "-p", str(pid)]
    return subprocess.run(command, capture_output=True, text=True).stdout[:1]


def ended(pid: int) -> bool:
    return state(pid) in ("", "Z")


def wait_until(holds) -> None:
    """Without a limit of its own: the suite has one."""
    while not holds():
        time.sleep(0.02)


def test_they_work_while_the_block_runs():
    with neighbours(2) as started:
        assert len(set(started)) == 2
        wait_until(lambda: all(state(pid) == "R" for pid in started))
        assert {state(pid) for pid in started * 5} == {"R"}
    assert all(map(ended, started))
    with neighbours(0) as none:
        assert none == []


def test_an_error_ends_them():
    with pytest.raises(ValueError, match="timed"), neighbours(1) as started:
        raise ValueError("what is timed fails")
    assert all(map(ended, started))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_they_end_with_who_started_them(number):
    """Ctrl-C reaches the whole group, as a terminal sends it; after SIGKILL nobody cleans up."""
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    started = json.loads(process.stdout.readline())
    wait_until(lambda: all(state(pid) == "R" for pid in started))
    send = os.killpg if number == signal.SIGINT else os.kill
    send(process.pid, number)
    assert process.wait() == (-number if number == signal.SIGKILL else 128 + number)
    wait_until(lambda: all(map(ended, started)))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "1000"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "active"}, "None"),
    ],
)
def test_threads_of_ours_do_not_spin_for_long_unless_the_user_says_so(given, expected):
    own = {key: value for key, value in os.environ.items() if "GOMP" not in key}
    code = "import runners, os; print(os.environ.get('GOMP_SPINCOUNT'))"
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, cwd=ROOT, env={**own, **given}, capture_output=True, text=True)
    assert found.stdout.strip() == expected
