"""The table at equal FLOPs, against figures worked out by hand."""

from __future__ import annotations

import subprocess
import sys

import pandas as pd
import pytest

from analysis import equal_flops
from analysis.frames import Store
from tests.analysis.store import stage, write_point
from tests.conftest import ROOT


def table(folder) -> tuple[pd.DataFrame, pd.DataFrame]:
    return equal_flops.table(equal_flops.rows(Store(folder)), [0.9, 0.8, 0.7])


def test_a_share_lies_between_its_two_neighbours_in_the_logarithm(tmp_path):
    """0.8 is a third of the way from 0.84 (ratio 1.5) to 0.72 (ratio 12)."""
    for sparsity, perplexity in ((0.1, 22.0), (0.2, 30.0), (0.35, 240.0)):
        write_point(tmp_path, "informed", sparsity, perplexity=perplexity)  # FLOPs 1 - 0.8 s
    numbers, readable = table(tmp_path)
    found = numbers.set_index("flops").ratio
    assert found[0.8] == pytest.approx(1.5 * 8 ** (1 / 3))
    assert found[0.9] == pytest.approx(1.1 * (1.5 / 1.1) ** 0.25)
    assert 0.7 not in found  # below the lowest, 0.72: nothing is extrapolated
    (row,) = readable.to_dict("records")
    assert row["method"] == "informed" and row["at 0.7"] == "" and row["at 0.8"] == "3.000"


def test_a_point_at_the_share_is_itself_and_the_dense_model_is_none(tmp_path):
    write_point(tmp_path, "dense", 0.0, perplexity=20.0)
    write_point(tmp_path, "greedy", 0.3, perplexity=40.0, flops_ratio=0.8)
    write_point(tmp_path, "informed", 0.3, perplexity=30.0, flops_ratio=0.808)
    write_point(tmp_path, "layer_skip", 0.3, perplexity=35.0, flops_ratio=0.82)
    numbers, readable = table(tmp_path)
    found = dict(zip(numbers.method, numbers.ratio, strict=True))
    assert found == pytest.approx({"greedy": 2.0, "informed": 1.5})
    assert list(readable["method"]) == ["informed", "greedy", "layer_skip"]  # least loss first


def test_seeds_are_one_point(tmp_path):
    for seed, perplexity in ((0, 20.0), (1, 45.0)):
        own = {"seed": seed, "flops_ratio": 0.79 + 0.02 * seed}
        write_point(tmp_path, "informed", 0.3, perplexity=perplexity, **own)
    numbers, _ = table(tmp_path)
    assert list(numbers.flops) == [0.8] and numbers.ratio[0] == pytest.approx(1.5)


def test_tradeoff_writes_it_too_and_shares_are_asked_for(tmp_path):
    stages = [stage("fit", 1.0), stage("calibrate", 2.0)]
    write_point(tmp_path, "informed", 0.3, perplexity=30.0, flops_ratio=0.85, stages=stages)

    def run(script: str, *words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, ROOT / "analysis" / script, f"results_dir={tmp_path}", *words]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert run("tradeoff.py").returncode == 0
    (written,) = (tmp_path / "plots").glob("equal_flops-*.md")
    assert "| sotu perplexity | informed |  |  |  |  |" in written.read_text()
    (beside,) = (tmp_path / "plots").glob("tradeoff-*.md")
    assert "| FLOPs | tokens read |" in beside.read_text() and "| 2,000 |" in beside.read_text()
    assert run("equal_flops.py", "flops=0.85,0.5").returncode == 0
    assert "| sotu perplexity | informed | 1.500 |  |" in written.read_text()
    wrong = run("equal_flops.py", "flops=most")
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: flops=most: shares")
