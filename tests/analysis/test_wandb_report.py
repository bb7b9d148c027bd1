"""The definition of a W&B Report, as its own library reads it back."""

from __future__ import annotations

import json

import pytest

from analysis import wandb_report
from analysis.frames import AnalysisError
from tests.analysis.store import stage, write_point

pytest.importorskip("wandb_workspaces")


@pytest.fixture
def store(tmp_path):
    for method in ("informed", "greedy"):
        write_point(tmp_path, method, 0.3, perplexity=30.0, stages=[stage("routers", 12.0)])
    return tmp_path


def test_offline_writes_the_definition(store):
    wandb_report.main([f"results_dir={store}", "project=mine"])
    text = (store / "plots" / "wandb_report.json").read_text()
    from wandb_workspaces.reports.v2 import Report, internal

    again = Report._from_model(internal.ReportViewspec.model_validate_json(text))
    assert (again.project, again.title) == ("mine", "Token routing")
    grids = [block for block in again.blocks if type(block).__name__ == "PanelGrid"]
    assert [[r.name for r in grid.runsets] for grid in grids] == [["greedy", "informed"]] * 3
    assert "in ['greedy-0.3-0-']" in grids[0].runsets[0].filters
    panels = [type(panel).__name__ for grid in grids for panel in grid.panels]
    assert panels.count("ScatterPlot") == 4
    assert {"LinePlot", "BarPlot", "MediaBrowser"} <= set(panels)
    assert "perplexity/sotu/value" in text and "| informed | routers | 12.0 |" in text
    assert json.loads(text)["displayName"] == "Token routing"


@pytest.mark.parametrize(
    ("words", "named"),
    [(["mode=online"], "entity="), (["mode=maybe"], "offline or online"), (["colour=1"], "colour")],
)
def test_mistakes_are_one_line(store, monkeypatch, words, named):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(AnalysisError, match=named):
        wandb_report.main([f"results_dir={store}", *words])
