"""Points in other processes: a signal to the sweep ends the points that run, and it waits.

A worker that runs a point says so by a file in the folder of `failures`, which the sweep and its
workers share, on whatever machine they are. Asked to end, the sweep leaves word there; the workers
look for it, and each ends its point as if the signal had come to it.
"""

from __future__ import annotations

import logging
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runners.runtime.failures import own_folder, shared_folder
from runners.runtime.signals import Interrupted, handled

log = logging.getLogger(__name__)

PATIENCE_S = 25.0
"""For the workers to end in; Slurm kills 30 s after it has asked (`KillWait`)."""
LOOK_S = 0.3
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
    mark = folder / f"{MARK}{os.getpid()}-{platform.node()}"
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
    folder = own_folder()
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / STOP).touch()
    deadline = time.monotonic() + PATIENCE_S
    while any(map(_is_alive, folder.glob(f"{MARK}*"))) and time.monotonic() < deadline:
        time.sleep(0.05)


def _is_alive(mark: Path) -> bool:
    """Whether the process of a mark is there, as far as this machine can tell."""
    pid, _, machine = mark.name.removeprefix(MARK).partition("-")
    if machine != platform.node():
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    return True
