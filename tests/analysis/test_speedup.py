"""Speed-ups are read, drawn with their bound, and tabled; what differs in how is kept apart."""

from __future__ import annotations

import pandas as pd
import pytest

from analysis.cli import Paths, write
from analysis.frames import AnalysisError, Store
from analysis.speedup import VIEW, table
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
    rows = Store(store).speed
    assert len(rows) == 4 and set(rows.method) == {"informed"}
    prefill = rows[rows.phase == "prefill"].sort_values("sparsity")
    assert prefill.tokens.tolist() == [512, 512]
    assert prefill.speedup.tolist() == pytest.approx([1.3, 1.5])
    assert table(rows)[1].efficiency.tolist()[0] == f"{1.3 / 1.33:.3f}"


def test_speedup_is_of_the_tokens_per_second_beside_it(tmp_path):
    """The stored median of ratios may lie on the other side of 1 than the ratio of medians."""
    timed = case("seq", 8, 1.1, 1.4, 0.3) | {"dense_tps": 100.0, "routed_tps": 95.0}
    write_point(tmp_path, "informed", 0.3, perplexity=1.0, speed={"prefill": [timed]})
    row = table(Store(tmp_path).speed)[1].iloc[0]
    assert row["speed-up"].startswith("0.950 ") and row["efficiency"] == f"{0.95 / 1.4:.3f}"


def test_bound_is_dotted_beside_the_measured_line(store):
    figure = VIEW.draw(Store(store).speed, "title")
    panel = figure.axes[0]
    bound = next(line for line in panel.lines if line.get_label() == "bound")
    assert bound.get_linestyle() == ":"
    assert list(bound.get_ydata()) == pytest.approx([1.33, 1.55])
    assert panel.get_title() == "prefill, batch 1, 512 tokens"


@pytest.mark.parametrize("where", ["settings", "case"])
def test_drawn_decisions_are_marked_and_a_line_of_their_own(tmp_path, where):
    """Said once for all cases in older records, of each case in newer ones."""
    for sparsity, decisions in ((0.3, "real"), (0.5, "random")):
        own = {"decisions": decisions, "threads": 2}
        timed = case("seq", 8, 1.2, 1.4, sparsity) | (own if where == "case" else {})
        speed = {"prefill": [timed], "settings": own if where == "settings" else {}}
        write_point(tmp_path, "informed", sparsity, perplexity=1.0, speed=speed)
    rows = Store(tmp_path).speed
    _, readable = table(rows)
    assert dict(zip(readable["method"], readable["decisions"], strict=True)) == {
        "informed": "real",
        "informed [random decisions]": "random",
    }
    _, labels = VIEW.draw(rows, "title").axes[0].get_legend_handles_labels()
    assert {"informed", "informed [random decisions]"} <= set(labels)


def test_machines_and_threads_have_panels_of_their_own(tmp_path):
    own = [case("seq", 8, 1.0 + n / 10, 1.4, 0.3) | {"threads": n, "device": "c"} for n in (1, 2)]
    write_point(tmp_path, "informed", 0.3, perplexity=1.0, speed={"prefill": own})
    figure = VIEW.draw(Store(tmp_path).speed, "title")
    titles = [panel.get_title() for panel in figure.axes]
    assert titles == [f"prefill, batch 1, 8 tokens, threads {n}" for n in (1, 2)]


def test_files_are_written(store):
    write(VIEW, Paths(store, store / "plots"))
    names = {path.suffix for path in (store / "plots").iterdir()}
    assert names == {".png", ".pdf", ".csv", ".md", ".tex"}
    written = next((store / "plots").glob("*.csv"))
    assert len(pd.read_csv(written)) == 4


def test_a_store_without_speed_is_one_line(tmp_path):
    write_point(tmp_path, "greedy", 0.3, perplexity=40.0)
    with pytest.raises(AnalysisError, match=r"runners/speed\.py"):
        write(VIEW, Paths(tmp_path, tmp_path))
