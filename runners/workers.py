"""Points in other processes: a signal to the sweep reaches the points that run, and it waits.

A worker that runs a point says so by a file in the folder of `failures`, which the sweep and its
workers share. Asked to end, the sweep leaves word there that no further point shall begin, and
passes the signal on; every worker ends its point as if the signal had come to it.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from runners.failures import own_folder, shared_folder
from runners.interrupt import ASKING, Interrupted

log = logging.getLogger(__name__)

PATIENCE_S = 25.0
"""For the workers to end in; Slurm kills 30 s after it has asked (`KillWait`)."""
STOP, MARK = "stop", "at-work-"


@contextmanager
def at_work() -> Iterator[None]:
    """Around a point, inside `interrupt.listening`. In a process that no sweep has started to run
    its points, this does nothing.

    Raises:
        Interrupted: the sweep is ending.
    """
    folder = shared_folder()
    if folder is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / f"{MARK}{os.getpid()}"
    mark.touch()
    try:
        if (folder / STOP).exists():
            raise Interrupted(signal.SIGTERM)
        yield
    finally:
        mark.unlink(missing_ok=True)


@contextmanager
def passing_on() -> Iterator[None]:
    """Handle the signals for a sweep whose workers are other processes of this machine (joblib)."""
    if not any(word.startswith("hydra/launcher=joblib") for word in sys.argv[1:]):
        yield
        return
    before = {number: signal.signal(number, _end_all) for number in ASKING}
    try:
        yield
    finally:
        for number, own in before.items():
            signal.signal(number, own)


def _end_all(number: int, frame: Any = None) -> None:
    """The handler: ask the workers, wait for them, end. A second Ctrl-C does not wait.

    Raises:
        Interrupted: always.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    name = signal.Signals(number).name
    log.error("sweep stopped by %s; the same command goes on from here", name)
    no_more_points()
    asked: set[int] = set()
    deadline = time.monotonic() + PATIENCE_S
    while (working := _working()) and time.monotonic() < deadline:
        for pid in working - asked:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        asked |= working
        time.sleep(0.05)
    raise Interrupted(number)


def no_more_points() -> None:
    """Leave word that no worker shall begin another point."""
    folder = own_folder()
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / STOP).touch()


def _working() -> set[int]:
    """Processes that run a point."""
    folder = own_folder()
    marks = [] if folder is None else folder.glob(f"{MARK}*")
    return {pid for mark in marks if _exists(pid := _pid(mark))}


def _pid(mark: Path) -> int:
    return int(mark.name.removeprefix(MARK))


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
