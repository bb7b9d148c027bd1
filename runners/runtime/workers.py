"""Run points in other processes: their failures come back to the sweep, its signals go to them.

A sweep shares a folder with the workers that a launcher starts for it, on whatever machine they
are, and names it in their environment. A worker leaves a file there for each point that ended or
failed and a mark while a point runs. Asked to end, the sweep leaves word there; the workers look
for it, and each ends its point as if the signal had come to it.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runners.runtime.signals import Interrupted, handled

log = logging.getLogger(__name__)

VARIABLE = "ROUTEBENCH_FAILURES"
"""Names the folder, which has to be on a disk that all workers share: Hydra's `outputs`."""
FOLDER = Path("outputs")
PATIENCE_S = 25.0
"""For the workers to end in; Slurm kills 30 s after it has asked (`KillWait`)."""
LOOK_S = 0.3
STOP, MARK = "stop", "at-work-"

POINTS = "ROUTEBENCH_POINTS"
"""Names how many points the sweep has."""
FAILED, ENDED = "failed", "ended"

failed_points: list[str] = []
"""Reasons of points that failed in this process; a sweep goes on after one."""
ended_points: list[str] = []
"""Folders of points that have a record, complete or failed."""


def note_failure(reason: str) -> None:
    """Remember a failed point, and tell the process that started the sweep."""
    _note(failed_points, FAILED, reason)


def note_end(folder: Path) -> None:
    """Remember a point that has its record, and tell the process that started the sweep."""
    _note(ended_points, ENDED, str(folder.absolute()))


def _note(kept: list[str], kind: str, text: str) -> None:
    kept.append(text)
    folder = _shared_folder(in_worker=True)
    if folder is not None:
        (folder / f"{time.time_ns()}-{uuid.uuid4().hex}.{kind}").write_text(text)


def alone() -> bool:
    """Whether this process runs all points of its sweep, and no worker does."""
    named = os.environ.get(VARIABLE)
    return not named or Path(named).name.startswith(f"failed-{os.getpid()}-")


def _shared_folder(*, in_worker: bool) -> Path | None:
    """The shared folder, made, if this process is a worker; or if it is the sweep itself."""
    named = os.environ.get(VARIABLE)
    if not named or alone() == in_worker:
        return None
    folder = Path(named)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def collected_failures() -> Iterator[list[str]]:
    """Add what workers note inside the block, and show their failures.

    Yields:
        `failed_points`, complete when the block has ended.
    """
    folder = FOLDER.absolute() / f"failed-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    os.environ[VARIABLE] = str(folder)
    try:
        yield failed_points
    finally:
        del os.environ[VARIABLE]
        for file in sorted(folder.glob(f"*.{ENDED}")):
            ended_points.append(file.read_text())
        for file in sorted(folder.glob(f"*.{FAILED}")):
            reason = file.read_text()
            failed_points.append(reason)
            sys.stderr.write(f"error: {reason}\n")
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def at_work() -> Iterator[None]:
    """Mark that a point runs, inside `signals.listening`; outside a worker this does nothing.

    Raises:
        Interrupted: the sweep is ending.
    """
    folder = _shared_folder(in_worker=True)
    if folder is None:
        yield
        return
    mark = folder / f"{MARK}{uuid.uuid4().hex}"
    mark.touch()
    done = threading.Event()
    try:
        if (folder / STOP).exists():
            raise Interrupted(signal.SIGTERM)
        threading.Thread(target=_watch, args=(folder / STOP, done), daemon=True).start()
        yield
    finally:
        done.set()
        mark.unlink(missing_ok=True)


def _watch(word: Path, done: threading.Event) -> None:
    """Send this process the signal when the sweep has left word."""
    while not done.wait(LOOK_S):
        if word.exists():
            os.kill(os.getpid(), signal.SIGTERM)
            return


@contextmanager
def passing_on() -> Iterator[None]:
    """Handle the signals of a sweep whose points run in joblib's workers."""
    if not any(word.startswith("hydra/launcher=joblib") for word in sys.argv[1:]):
        yield
        return
    with handled(_end_all):
        yield


def _end_all(number: int, frame: Any = None) -> None:
    """The handler. A second Ctrl-C does not wait for the workers.

    Raises:
        Interrupted: always.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    end_points(number)
    raise Interrupted(number)


def end_points(number: int) -> None:
    """Have the workers end their points, begin none, and wait for them."""
    name = signal.Signals(number).name
    log.error("sweep stopped by %s; the same command goes on from here", name)
    folder = _shared_folder(in_worker=False)
    if folder is None:
        return
    (folder / STOP).touch()
    deadline = time.monotonic() + PATIENCE_S
    while any(folder.glob(f"{MARK}*")) and time.monotonic() < deadline:
        time.sleep(0.05)
