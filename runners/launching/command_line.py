"""From the command line to Hydra: mistakes are found here, before anything heavy loads."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runners.errors import UserError
from runners.launching.check import check_point
from runners.launching.conclusion import conclude
from runners.launching.points import CommandLine
from runners.point_config import PointConfig
from runners.runtime.processes import is_main_process
from runners.runtime.workers import (
    POINTS,
    collected_failures,
    ended_points,
    note_failure,
    passing_on,
)

ROOT = Path(__file__).resolve().parents[2]
ANSWERED = {"--help", "-h", "--cfg", "-c", "--info", "-i"}
"""Flags to which Hydra answers without running a point."""
SHELL = {"--hydra-help", "--shell-completion", "-sc"}
"""Those to which it does without reading the other words."""
COMPLETION = Path(__file__).with_name("completion.bash")
"""Instead of Hydra's, which knows `python` only, without a folder, and runs whatever script stands
behind it."""
MAX_CHECKED_POINTS = 512
"""To compose one takes a tenth of a second."""
Check = Callable[[Mapping[str, Any]], object]


def launch(entry: Callable[[], Any], config_name: str, check: Check = check_point) -> None:
    """Check the arguments, run a Hydra entry; exit 2 on a user's mistake, 1 on a failed point.

    Args:
        check: of each composed config; raises UserError.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    inherited = os.environ.get("PYTHONPATH")  # launchers' processes run this clone's code too
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([inherited] if inherited else [])])
    if "--version" in sys.argv[1:]:
        sys.stdout.write(f"{version()}\n")
        return
    if {"-sc", "--shell-completion"} & set(sys.argv[1:]) and "install=bash" in sys.argv[1:]:
        sys.stdout.write(COMPLETION.read_text())
        return
    first = None
    try:
        if not SHELL & set(sys.argv[1:]):
            line = CommandLine(sys.argv[1:], config_name)
            if ANSWERED & set(sys.argv[1:]):
                line.check_keys()
            else:
                first = _check_points(line, check)
                os.environ[POINTS] = str(len(line))
                sys.argv[1:] = line.arguments()
        with collected_failures() as failed, passing_on():
            entry()
        if isinstance(first, PointConfig) and is_main_process():
            conclude(ended_points, report=first.store.report)
    except UserError as error:
        sys.exit(_end(error, 2))
    except KeyboardInterrupt:  # before a point listens, or after
        sys.exit(128 + signal.SIGINT)
    if failed:
        sys.exit(1)


def prepare(arguments: Sequence[str], config_name: str, check: Check = check_point) -> list[str]:
    """Check every point of a sweep; give the arguments that Hydra is to get.

    Raises:
        UserError: one line.
    """
    line = CommandLine(arguments, config_name)
    _check_points(line, check)
    return line.arguments()


def _check_points(line: CommandLine, check: Check) -> object:
    """What the check gives of the first point."""
    checked = [check(config) for config in itertools.islice(line.points(), MAX_CHECKED_POINTS)]
    first = next(iter(checked), None)
    tunes = isinstance(first, PointConfig) and first.tune
    if tunes and line.sweeping and not line.swept:
        raise UserError(
            "tune=true searches the options that the command gives several values, such as "
            "method.training.lr=3.0e-4,1.0e-3,3.0e-3"
        )
    return first


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Inside a Hydra entry: a user's mistake ends in one line and exit code 1, no traceback."""
    try:
        yield
    except UserError as error:
        _end(error, 1)
        note_failure(str(error))


def version() -> str:
    """Name and version of this clone."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return f"{project['name']} {project['version']}"


def _end(error: Exception, code: int) -> int:
    if is_main_process():  # the others make the same mistake
        sys.stderr.write(f"error: {error}\n")
    return code
