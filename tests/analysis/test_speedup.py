"""Speed-ups are read, drawn with their bound, and tabled."""

from __future__ import annotations

import pandas as pd
import pytest

from analysis import frames
from analysis.cli import AnalysisError, Paths
from analysis.speedup import draw, main, summary
from tests.analysis.store import write_point


def case(length: str, tokens: int, speedup: float, bound: float, sparsity: float) -> dict:
    return {
        length: tokens,
        "batch": 1,
        "dense_tps": 100.0,
        "routed_tps": 100.0 * speedup,
        "speedup": speedup,
        "speedup_p20": speedup - 0.1,
        "speedup_p80": speedup + 0.1,
        "bound": bound,
        "efficiency": speedup / bound,
        "sparsity": sparsity,
    }


@pytest.fixture
def store(tmp_path):
    for sparsity in (0.3, 0.5):
        speed = {
            "prefill": [case("seq", 512, 1 + sparsity, 1 + 1.1 * sparsity, sparsity)],
            "decode": [case("context", 64, 1 + sparsity / 2, 1 + sparsity, sparsity)],
            "settings": {"device": "a processor"},
        }
        write_point(tmp_path, "informed", sparsity, perplexity=30.0, speed=speed)
    write_point(tmp_path, "greedy", 0.3, perplexity=40.0)
    return tmp_path


def test_one_row_a_case(store):
    rows = frames.speed(frames.read_store(store))
    assert len(rows) == 4 and set(rows.method) == {"informed"}
    prefill = rows[rows.phase == "prefill"].sort_values("sparsity")
    assert prefill.tokens.tolist() == [512, 512]
    assert prefill.speedup.tolist() == [1.3, 1.5]
    assert summary(rows).efficiency.tolist()[0] == f"{1.3 / 1.33:.3f}"


def test_bound_is_dashed_beside_the_measured_line(store):
    figure = draw(frames.speed(frames.read_store(store)), "title")
    panel = figure.axes[0]
    bound = next(line for line in panel.lines if line.get_label() == "bound")
    assert bound.get_linestyle() == "--"
    assert list(bound.get_ydata()) == pytest.approx([1.33, 1.55])
    assert panel.get_title() == "prefill, batch 1, 512 tokens"


def test_files_are_written(store):
    main(Paths(store, store / "plots"))
    names = {path.suffix for path in (store / "plots").iterdir()}
    assert names == {".png", ".pdf", ".csv", ".md", ".tex"}
    table = next((store / "plots").glob("*.csv"))
    assert len(pd.read_csv(table)) == 4


def test_a_store_without_speed_is_one_line(tmp_path):
    write_point(tmp_path, "greedy", 0.3, perplexity=40.0)
    with pytest.raises(AnalysisError, match=r"runners/speed\.py"):
        main(Paths(tmp_path, tmp_path))
