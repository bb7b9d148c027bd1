"""A second clone, run with the environment of the first, runs its own code."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

FOLDERS = ("methods", "runners", "analysis", "benchmarks", "conf")
ENTRIES = [
    path.relative_to(ROOT)
    for folder in ("runners", "analysis", "benchmarks")
    for path in sorted((ROOT / folder).glob("*.py"))
    if '__name__ == "__main__"' in path.read_text() and path.stem != "routed_lm"
]
SAID = "the code of the second clone\n"
MARKED = ("runners/errors.py", "analysis/cli.py")
"""Files that say so when they are imported; benchmarks use the first."""


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another copy of the code, in which two files differ."""
    copy = tmp_path_factory.mktemp("clone")
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignored)
    for name in MARKED:
        with (copy / name).open("a") as file:
            file.write(f"\n__import__('sys').stderr.write({SAID!r})\n")
    return copy


@pytest.mark.parametrize(
    "command",
    [
        ("runners/sweep.py", "sparsity=2"),
        ("analysis/pareto.py", "nonsense"),
        ("benchmarks/parallel.py", "--repeats=nonsense"),
    ],
    ids=lambda command: command[0].partition("/")[0],
)
def test_its_own_code_runs(clone, tmp_path, command):
    """The first clone is importable, as where `pip install -e .` was run in it."""
    script, *words = command
    done = subprocess.run(
        [sys.executable, str(clone / script), *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode != 0
    assert SAID in done.stderr
    assert str(ROOT) + os.sep not in done.stderr


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_every_entry_puts_its_clone_first(entry):
    """Before it imports any of our modules."""
    text = (ROOT / entry).read_text()
    first = min(
        text.find(f"\n{word} {package}")
        for word in ("from", "import")
        for package in ("methods", "runners", "analysis", "benchmarks")
        if f"\n{word} {package}" in text
    )
    own = "sys.path[0] = str(Path(__file__).resolve().parents[1])"
    assert 0 <= text.find(own) < first
