"""The C loops of this folder, compiled once a machine and loaded into the process."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from torch import Tensor

log = logging.getLogger(__name__)

FOLDER = Path(__file__).resolve().parent
SOURCES = ("rows.c", "mlp.c", "forecast.c", "attend.c")
HEADER = "loops.h"
MAX_RANK = 512
"""Of `forecast.c`; beyond it a matrix product of the library is as fast."""
MAX_HEAD = 256
"""Of `attend.c`."""
PANEL = 64
"""Keys that `attend.c` keeps together."""
SIZES = {"MAX_RANK": MAX_RANK, "MAX_HEAD": MAX_HEAD, "PANEL": PANEL}
# sums may be reordered as vectors need it; infinities and NaN stay what they are
OPTIONS = (
    "-O3 -march=native -fno-math-errno -fno-trapping-math -fno-signed-zeros -fassociative-math "
    "-ffp-contract=fast -fopenmp -shared -fPIC"
).split()
FLAGS = [*OPTIONS, *(f"-D{name}={size}" for name, size in SIZES.items())]


class _Tensor:
    """What a loop is given of a tensor: where its first number lies. None is a null pointer."""

    @staticmethod
    def from_param(tensor: Tensor | None) -> ctypes.c_void_p | None:
        return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())


KINDS = {
    "t": _Tensor,
    "i": ctypes.c_int64,
    "f": ctypes.c_float,
    "n": ctypes.POINTER(ctypes.c_int64),
}
ARGUMENTS = {
    "rms_norm": "ttftiittt",
    "silu_mul": "tti",
    "partition": "tttnii",
    "rotate": "ttttitiiiiiii",
    "add_rows": "ttittii",
    "mlp": "tiitttttttii",
    "attend": "ttiitiitfttiiiii",
    "attend_one": "ttiitiifttiiii",
    "forecast": "tttitittttiii",
}
"""A letter for each argument, of `KINDS`."""
INDEXED = ("rotate", "add_rows", "mlp", "attend", "forecast")
"""Loops that read row numbers, and return 1 before any work if one lies outside of its buffer."""


class NoCompiler(RuntimeError):
    """The loops cannot be compiled here; the message says why."""


@cache
def library() -> ctypes.CDLL:
    """The compiled loops.

    Raises:
        NoCompiler: no C compiler (`CC`, cc, gcc or clang), or one without OpenMP. `CFLAGS` is
            added to the flags.
    """
    found = (shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang"))
    compiler = next(filter(None, found), None)
    if compiler is None:
        raise NoCompiler("no C compiler (cc, gcc or clang) on PATH")
    try:
        return _loaded(compiler)
    except (OSError, ValueError) as problem:
        raise NoCompiler(f"the compiled loops do not load: {problem}") from problem


@cache
def reason_without() -> str | None:
    """Why there is no library here; None if there is one."""
    try:
        library()
    except NoCompiler as problem:
        log.info("no compiled loops, PyTorch operations instead: %s", problem)
        return str(problem)
    return None


def _loaded(compiler: str) -> ctypes.CDLL:
    try:
        return _load(_built(compiler))
    except NoCompiler:
        raise
    except (OSError, RuntimeError):
        log.info("no folder to keep compiled loops in: compiled for this process alone")
    with tempfile.TemporaryDirectory(prefix="routebench-") as scratch:
        return _load(_compiled(compiler, Path(scratch) / "loops.so"))


def _load(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    for name, letters in ARGUMENTS.items():
        function = getattr(loaded, name)
        function.argtypes = [KINDS[letter] for letter in letters]
        function.restype = _refuse if name in INDEXED else None
    return loaded


def _refuse(outside: int) -> None:
    if outside:
        raise IndexError("a row number lies outside of its buffer")


def _built(compiler: str) -> Path:
    """The shared library of this source, compiler and processor; made if it is not there."""
    folder, name = _folder(), f"loops-{_key(compiler)}.so"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / name
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            os.replace(_compiled(compiler, Path(scratch) / name), path)
    return path


def _folder() -> Path:
    """Of this user alone: what lies there is loaded as code."""
    own = os.environ.get("XDG_CACHE_HOME")
    return (Path(own) if own else Path.home() / ".cache") / "routebench" / "loops"


def _compiled(compiler: str, path: Path) -> Path:
    sources = [str(FOLDER / name) for name in SOURCES]
    command = [compiler, *_flags(), *sources, "-o", str(path), "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise NoCompiler(f"{compiler} cannot compile them: {lines[0]}")
    return path


def _flags() -> list[str]:
    return [*FLAGS, *shlex.split(os.environ.get("CFLAGS", ""))]


def _key(compiler: str) -> str:
    """Changes with the source, the flags, the compiler and what the processor can do."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    parts = [(FOLDER / name).read_bytes() for name in (*SOURCES, HEADER)]
    parts += [version, " ".join(_flags()).encode(), platform.machine().encode(), _features()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _features() -> bytes:
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return platform.processor().encode()
    return next((line for line in lines if line.startswith((b"flags", b"Features"))), b"")
