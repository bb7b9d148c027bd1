"""Points that failed, whichever process ran them; the one that started the sweep has to know.

A launcher may run points in other processes, on other machines. Each of these finds in its
environment where to write why a point failed.
"""

from __future__ import annotations

import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

VARIABLE = "ROUTEBENCH_FAILURES"
"""Names the folder, which has to be on a disk that all workers share: Hydra's `outputs`."""
FOLDER = Path("outputs")

failed_points: list[str] = []
"""Reasons of points that failed in this process; a sweep goes on after one."""


def note(reason: str) -> None:
    """Remember a failed point, and tell the process that started the sweep."""
    failed_points.append(reason)
    folder = shared_folder()
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{uuid.uuid4().hex}.txt").write_text(reason)


def shared_folder() -> Path | None:
    """In a worker, the folder of the sweep that started it; None in the sweep itself."""
    folder = os.environ.get(VARIABLE)
    return Path(folder) if folder and not _is_own(folder) else None


def own_folder() -> Path | None:
    """In a sweep, the folder that it shares with its workers."""
    folder = os.environ.get(VARIABLE)
    return Path(folder) if folder and _is_own(folder) else None


def _is_own(folder: str) -> bool:
    return Path(folder).name.startswith(f"failed-{os.getpid()}-")


@contextmanager
def gathered() -> Iterator[list[str]]:
    """Add what other processes note inside the block, and show it.

    Yields:
        `failed_points`, complete when the block has ended.
    """
    folder = FOLDER.absolute() / f"failed-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    os.environ[VARIABLE] = str(folder)
    try:
        yield failed_points
    finally:
        del os.environ[VARIABLE]
        for file in sorted(folder.glob("*.txt")):
            reason = file.read_text()
            failed_points.append(reason)
            sys.stderr.write(f"error: {reason}\n")
        shutil.rmtree(folder, ignore_errors=True)
