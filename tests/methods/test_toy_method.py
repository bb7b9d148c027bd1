"""A method is one file and one YAML: the example of CONTRIBUTING.md, as written there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, SHRUNK

FOLDERS = ("methods", "runners", "analysis", "benchmarks", "conf", "tests", "docs")
FILES = ("pyproject.toml", "mkdocs.yml", "CONTRIBUTING.md", "README.md", "Makefile")


@pytest.fixture
def copy(tmp_path):
    """The repository, with the two files of the walk-through added and none changed."""
    for folder in FOLDERS:
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    for file in FILES:
        shutil.copy(ROOT / file, tmp_path)
    text = (ROOT / "CONTRIBUTING.md").read_text()
    blocks = dict(re.findall(r"^ +```(python|yaml)\n(.*?)^ +```$", text, re.M | re.S))
    plain = {kind: re.sub(r"^ {3}", "", block, flags=re.M) for kind, block in blocks.items()}
    (tmp_path / "methods/token_norm.py").write_text(plain["python"])
    (tmp_path / "conf/method/token_norm.yaml").write_text(plain["yaml"])
    return tmp_path


def run(copy: Path, *command: str) -> subprocess.CompletedProcess[str]:
    own = {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment = {**os.environ, **own}
    return subprocess.run(
        [sys.executable, *command],
        cwd=copy,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_the_walk_through_adds_a_method_that_sweeps_and_is_drawn(copy):
    places = ("tracking=off", "results_dir=results", f"cache_dir={copy / 'cache'}")
    done = run(copy, "runners/sweep.py", *SHRUNK, *places, "method=token_norm", "sparsity=0.3")
    assert done.returncode == 0, done.stderr
    (path,) = copy.glob("results/*/result.json")
    record = json.loads(path.read_text())
    assert record["method"] == "token_norm" and record["status"] == "complete"
    assert record["realised"]["calibration"] == pytest.approx(0.3, abs=0.03)
    drawn = run(copy, "analysis/tradeoff.py", "results_dir=results")
    assert drawn.returncode == 0, drawn.stderr
    (table,) = copy.glob("results/plots/tradeoff-*.md")
    assert "token_norm" in table.read_text()


def test_the_tests_pass_with_it(copy):
    """Those of `make test` that find it: the contract, import rules and pages of the site."""
    found = ("-k", "token_norm or test_docs.py or test_no_type_check_on_a_method")
    where = ("tests/methods", "--ignore=tests/methods/engine", "tests/runners/launching")
    quiet = ("-q", "-p", "no:cacheprovider")
    done = run(copy, "-m", "pytest", *quiet, *found, *where, "tests/test_docs.py")
    assert done.returncode == 0, done.stdout
    (passed,) = re.findall(r"(\d+) passed", done.stdout)
    assert int(passed) >= 40, done.stdout


def test_lint_passes_with_it(copy):
    for words in (("check", "."), ("format", "--check", ".")):
        done = run(copy, "-m", "ruff", *words)
        assert done.returncode == 0, done.stdout
