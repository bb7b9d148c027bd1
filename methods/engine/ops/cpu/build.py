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
POINTER, INT, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
SIGNATURES = {
    "rms_norm": (
        None,
        [*(POINTER, POINTER, FLOAT, POINTER, INT, INT), *(POINTER, POINTER, POINTER)],
    ),
    "silu_mul": (None, [POINTER, POINTER, INT]),
    "rotate": (
        None,
        [
            *(POINTER, POINTER, POINTER, POINTER, INT),
            *(POINTER, INT, INT, INT),
            *(INT, INT, INT, INT),
        ],
    ),
    "add_rows": (None, [POINTER, POINTER, POINTER, POINTER, INT, INT]),
    "partition": (None, [POINTER, POINTER, POINTER, POINTER, POINTER, INT, INT]),
    "mlp": (
        None,
        [
            *(POINTER, POINTER, INT, INT, POINTER, POINTER, POINTER, INT),
            *(POINTER, POINTER, POINTER),
        ],
    ),
    "attend": (
        None,
        [
            *(POINTER, POINTER, INT, INT, POINTER, INT, INT, POINTER),
            *(FLOAT, POINTER, POINTER, INT, INT, INT, INT),
        ],
    ),
    "forecast": (
        None,
        [
            *(POINTER, POINTER, POINTER, POINTER, INT, INT, INT),
            *(POINTER, POINTER, POINTER, POINTER, INT),
        ],
    ),
}


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
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


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
