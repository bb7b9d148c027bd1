"""Perplexity against seconds of training: interpolated, never extrapolated."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from analysis import training_time
from analysis.cli import Paths, write
from analysis.drawing import style
from analysis.frames import AnalysisError, Store
from analysis.training_time import CURVE, seconds_to
from tests.analysis.store import stage, write_point


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        (4.0, (10.0, True)),  # there at the first point: not later
        (5.0, (10.0, True)),
        (2.0, (100.0, False)),  # at a point
        (2 * 2**0.5, (10 * 10**0.5, False)),  # half the way in logarithms
        (1.9, (float("nan"), False)),
    ],
)
def test_seconds_to_a_level(level, expected):
    found = seconds_to(level, [10.0, 100.0, 1000.0], [4.0, 2.0, 3.0])
    assert found == pytest.approx(expected, nan_ok=True)


@pytest.fixture
def store(tmp_path):
    """Two methods at three budgets, dense perplexity 20; dense and an untrained one beside."""
    curves = {"informed": ((50, 29.0), (200, 28.0), (800, 26.0))}
    curves["skipgpt"] = ((40, 100.0), (160, 50.0), (640, 32.0))
    for method, points in curves.items():
        for scale, (seconds, perplexity) in zip((1, 4, 16), points, strict=True):
            write_point(
                tmp_path,
                method,
                0.25,
                perplexity=perplexity,
                config={"budget": {"name": "quick", "scale": scale}, "eval": {"name": "quick"}},
                stages=[stage("routers", seconds - 1.0), stage("calibrate", 1.0)],
            )
    for method in ("dense", "random"):
        config = {"budget": {"name": "quick", "scale": 1}, "eval": {"name": "quick"}}
        write_point(tmp_path, method, 0.25, perplexity=400.0, config=config)
    return tmp_path


def test_the_table_says_what_each_budget_brings(store):
    write(CURVE, Paths(store, store / "plots"))
    found = pd.read_csv(store / "plots/training_curve-tiny-sotu-quick.csv").set_index("method")
    assert list(found.loc["informed", "training_s"]) == [50.0, 200.0, 800.0]
    assert list(found.loc["informed", "ratio"]) == pytest.approx([1.45, 1.4, 1.3])
    expected = np.exp(np.interp(-np.log(2), -np.log([2.5, 1.6]), np.log([160, 640])))
    assert list(found.loc["skipgpt", "seconds_to_2"]) == pytest.approx([expected] * 3)
    text = (store / "plots/training_curve-tiny-sotu-quick.md").read_text()
    assert "| informed | sotu perplexity | 0.25 | 1.450 in 50 s | 1.400 in 200 s |" in text
    assert "| at most 50 | at most 50 |" in text
    assert f"| {expected:.0f} | not reached |" in text
    assert "random" not in text and "dense |" not in text.split("---")[-1]


def test_the_picture_has_one_line_a_method_named_at_its_end(store):
    with style.paper():
        panel = CURVE.draw(CURVE.rows(Store(store)), "title").axes[0]
    assert (panel.get_xscale(), panel.get_yscale()) == ("log", "log")
    handles, labels = panel.get_legend_handles_labels()
    lines = dict(zip(labels, handles, strict=True))
    assert set(lines) == {"dense", "informed", "skipgpt"}
    assert list(lines["skipgpt"].get_xdata()) == [40.0, 160.0, 640.0]
    assert [text.get_text() for text in panel.texts] == ["skipgpt", "informed"]
    assert panel.get_ylim()[1] <= 10


def test_budgets_are_lines_of_one_picture_elsewhere(store):
    points = Store(store).points
    assert points["setting"].nunique() == 1
    assert "informed (budget.scale=4)" in set(points["line"])


def test_points_of_one_budget_make_no_curve(tmp_path):
    for seed in range(2):
        write_point(
            tmp_path, "informed", 0.3, perplexity=30.0, seed=seed, stages=[stage("fit", 3.0)]
        )
    training_time.main([f"results_dir={tmp_path}"])
    assert not list((tmp_path / "plots").glob("training_curve*"))
    with pytest.raises(AnalysisError, match="experiment=budget"):
        write(CURVE, Paths(tmp_path, tmp_path / "plots"))


def test_two_variants_of_one_name_are_refused(store):
    config = {"budget": {"name": "quick", "scale": 4}, "eval": {"name": "quick"}, "mode": "masked"}
    write_point(store, "informed", 0.25, perplexity=9.0, config=config, stages=[stage("fit", 1.0)])
    with pytest.raises(AnalysisError, match="differ in more"):
        write(CURVE, Paths(store, store / "plots"))
