"""What a result was made with: code, packages, hardware, weights."""

from __future__ import annotations

import ast
import hashlib
import itertools
import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig

from runners.runtime.processes import world_size
from runners.store.redact import REDACTED, is_secret, redact_text

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "transformers", "lm_eval", "hydra-core", "wandb", "numpy", "routebench")
VERSION_DIGITS = 16
SOURCE = (".py", ".c", ".h")


def provenance() -> dict[str, Any]:
    """Command, git state, package versions and hardware, as JSON types (None where unknown)."""
    return {
        "command": started_with(),
        "git": git_state(REPOSITORY),
        "packages": {name: _package_version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device_name(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "processes": world_size(),
    }


def started_with() -> str | None:
    """The command of this point alone, `python runners/sweep.py method=informed sparsity=0.5`.

    One point of a sweep gives its own overrides. An experiment that is a sweep by itself would
    start all its points again, so `hydra.mode=RUN` is added. None outside a Hydra run.
    """
    if not HydraConfig.initialized():
        return None
    hydra = HydraConfig.get()
    words = [_clean(word) for word in hydra.overrides.task]
    if any(word.startswith("experiment=") for word in words):
        words.append("hydra.mode=RUN")
    script = str(hydra.job.name).rpartition(".")[2]
    return shlex.join(["python", f"runners/{script}.py", *words])


def _clean(word: str) -> str:
    key, separator, _ = word.partition("=")
    name = key.lstrip("+~").rpartition(".")[2]
    return f"{key}={REDACTED}" if separator and is_secret(name) else redact_text(word)


def git_state(folder: Path) -> dict[str, Any]:
    """`{commit, dirty}`; both None if `folder` is not the top of a git work tree."""
    unknown = {"commit": None, "dirty": None}
    top = _git(folder, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != folder.resolve():
        return unknown
    changes = _git(folder, "status", "--porcelain")
    return {
        "commit": _git(folder, "rev-parse", "--verify", "HEAD"),
        "dirty": None if changes is None else bool(changes),
    }


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _package_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def device_name() -> str:
    """The accelerator that torch would use, or the processor's model."""
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def stage_version(module: str, file: Path, root: Path = REPOSITORY) -> str:
    """Hash the code that a stage's product depends on, 16 hex digits.

    That is the training, the contract, the engine, and the method's own file with whatever it
    imports of its package and of this repository: another method's file does not count.

    Args:
        module: dotted name of the method's module.
        file: where it lies.
        root: of the repository.
    """
    methods = root / "methods"
    own = imported_files(file, [root, file.parents[module.count(".")]])
    contract = [methods / "base.py", methods / "types.py", methods / "engine"]
    return code_version(root / "runners" / "training", *contract, *sorted(own))


def imported_files(file: Path, roots: Sequence[Path]) -> set[Path]:
    """A Python file and those below `roots` that it imports, directly or not, from the source."""
    found: set[Path] = set()
    left = [file]
    while left:
        source = left.pop()
        if source in found:
            continue
        found.add(source)
        for node in ast.walk(ast.parse(source.read_bytes())):
            places = roots
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module or ''}.{alias.name}".strip(".") for alias in node.names]
                places = [source.parents[node.level - 1]] if node.level else roots
            else:
                continue
            for place, name in itertools.product(places, names):
                # importing a.b.c runs a and a.b too; c may be a name in a/b.py
                parts = name.split(".")
                for end in range(1, len(parts) + 1):
                    path = place.joinpath(*parts[:end])
                    named = (path.with_suffix(".py"), path / "__init__.py")
                    left += [module for module in named if module.is_file()]
    return found


def code_version(*sources: Path) -> str:
    """Hash source text, 16 hex digits: changes when, and only when, the code does.

    Args:
        sources: files, or folders (all Python and C below). Only their own names and text count,
            not where they are.

    Raises:
        FileNotFoundError: a source that has no file.
    """
    digest = hashlib.sha256()
    for source in sources:
        below = source.rglob("*.*") if source.is_dir() else [source]
        files = sorted(file for file in below if file.suffix in SOURCE or file == source)
        if not files:
            raise FileNotFoundError(f"no source at {source}")
        for file in files:
            name = file.relative_to(source.parent).as_posix()
            text = file.read_bytes().replace(b"\r\n", b"\n")
            digest.update(f"{name}|{len(text)}|".encode() + text)
    return digest.hexdigest()[:VERSION_DIGITS]
