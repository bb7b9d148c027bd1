"""Keep the cores busy while something is timed, so that a busy machine is repeatable."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

SPIN = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; who started this one ends it
while os.getppid() == int(sys.argv[1]):
    sum(range(100_000))
"""
"""Ends with its parent, however that ends: what is left then has another one."""


@contextmanager
def neighbours(count: int) -> Iterator[list[int]]:
    """Run processes that each keep a core busy, on whichever the system gives them.

    Yields:
        Their process ids; all have ended once the block is left.
    """
    command = [sys.executable, "-I", "-S", "-c", SPIN, str(os.getpid())]
    started: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(count):
            started.append(subprocess.Popen(command, stdin=subprocess.DEVNULL))
        yield [process.pid for process in started]
    finally:
        for process in started:
            process.kill()
        for process in started:
            process.wait()
