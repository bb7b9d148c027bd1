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

import torch
from torch import Tensor

log = logging.getLogger(__name__)

FOLDER = Path(__file__).resolve().parent
SOURCES = {
    torch.float32: ("rows.c", "mlp.c", "forecast.c", "attend.c"),
    torch.bfloat16: (
        "rows.c",
        "linear_tiles.c",
        "mlp_tiles.c",
        "forecast_tiles.c",
        "attend_tiles.c",
    ),
}
"""A library for each; the functions of the same name do the same in both."""
HEADERS = ("loops.h", "tiles.h")
MAX_RANK = 512
"""Of the forecast; beyond it a matrix product of the library is as fast."""
MAX_HEAD = 256
"""Of attention."""
PANEL = 64
"""Keys that attention keeps together."""
CHUNK = 512
"""Rows that the products of bfloat16 take at a time."""
SIZES = {"MAX_RANK": MAX_RANK, "MAX_HEAD": MAX_HEAD, "PANEL": PANEL, "CHUNK": CHUNK}
# sums may be reordered as vectors need it; infinities and NaN stay what they are
OPTIONS = (
    "-O3 -march=native -fno-math-errno -fno-trapping-math -fno-signed-zeros -fassociative-math "
    "-ffp-contract=fast -fopenmp -shared -fPIC"
).split()
FLAGS = [*OPTIONS, *(f"-D{name}={size}" for name, size in SIZES.items())]
FLAGS_OF = {
    torch.float32: FLAGS,
    torch.bfloat16: [*FLAGS, "-DBFLOAT16", "-mprefer-vector-width=512"],
}


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
    "forecast": "tttitittttiii",
}
"""A letter for each argument, of `KINDS`."""
ARGUMENTS_OF = {
    torch.float32: {**ARGUMENTS, "attend_one": "ttiitiifttiiii"},
    torch.bfloat16: {**ARGUMENTS, "linear": "titttttii", "permit": ""},
}
INDEXED = ("rotate", "add_rows", "mlp", "attend", "forecast")
"""Loops that read row numbers, and return 1 before any work if one lies outside of its buffer."""


class NoCompiler(RuntimeError):
    """The loops cannot be compiled here; the message says why."""


@cache
def library(dtype: torch.dtype = torch.float32) -> ctypes.CDLL:
    """The compiled loops over numbers of this precision, a key of `SOURCES`.

    Raises:
        NoCompiler: no C compiler (`CC`, cc, gcc or clang), or one without OpenMP; for bfloat16, no
            AMX. `CFLAGS` is added to the flags.
    """
    found = (shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang"))
    compiler = next(filter(None, found), None)
    if compiler is None:
        raise NoCompiler("no C compiler (cc, gcc or clang) on PATH")
    try:
        return _loaded(compiler, dtype)
    except (OSError, ValueError) as problem:
        raise NoCompiler(f"the compiled loops do not load: {problem}") from problem


@cache
def reason_without(dtype: torch.dtype = torch.float32) -> str | None:
    """Why there is no library here; None if there is one."""
    try:
        library(dtype)
    except NoCompiler as problem:
        log.info("no compiled loops, PyTorch operations instead: %s", problem)
        return str(problem)
    return None


def _loaded(compiler: str, dtype: torch.dtype) -> ctypes.CDLL:
    try:
        return _load(_built(compiler, dtype), dtype)
    except NoCompiler:
        raise
    except (OSError, RuntimeError):
        log.info("no folder to keep compiled loops in: compiled for this process alone")
    with tempfile.TemporaryDirectory(prefix="routebench-") as scratch:
        return _load(_compiled(compiler, dtype, Path(scratch) / "loops.so"), dtype)


def _load(path: Path, dtype: torch.dtype) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    for name, letters in ARGUMENTS_OF[dtype].items():
        function = getattr(loaded, name)
        function.argtypes = [KINDS[letter] for letter in letters]
        function.restype = _refuse if name in INDEXED else None
    if dtype == torch.bfloat16:
        loaded.permit.restype = ctypes.c_int
        if loaded.permit():
            raise NoCompiler("the system does not let a process use AMX")
    return loaded


def _refuse(outside: int) -> None:
    if outside:
        raise IndexError("a row number lies outside of its buffer")


def _built(compiler: str, dtype: torch.dtype) -> Path:
    """The shared library of this source, compiler and processor; made if it is not there."""
    folder, name = _folder(), f"loops-{_key(compiler, dtype)}.so"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / name
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            os.replace(_compiled(compiler, dtype, Path(scratch) / name), path)
    return path


def _folder() -> Path:
    """Of this user alone: what lies there is loaded as code."""
    own = os.environ.get("XDG_CACHE_HOME")
    return (Path(own) if own else Path.home() / ".cache") / "routebench" / "loops"


def _compiled(compiler: str, dtype: torch.dtype, path: Path) -> Path:
    sources = [str(FOLDER / name) for name in SOURCES[dtype]]
    command = [compiler, *_flags(dtype), *sources, "-o", str(path), "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        first = next((line for line in lines if "error" in line), lines[0])
        raise NoCompiler(f"{compiler} cannot compile them: {first}")
    return path


def _flags(dtype: torch.dtype) -> list[str]:
    return [*FLAGS_OF[dtype], *shlex.split(os.environ.get("CFLAGS", ""))]


def _key(compiler: str, dtype: torch.dtype) -> str:
    """Changes with the source, the flags, the compiler and what the processor can do."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    parts = [(FOLDER / name).read_bytes() for name in (*SOURCES[dtype], *HEADERS)]
    parts += [version, " ".join(_flags(dtype)).encode(), platform.machine().encode(), _features()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _features() -> bytes:
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return platform.processor().encode()
    return next((line for line in lines if line.startswith((b"flags", b"Features"))), b"")
