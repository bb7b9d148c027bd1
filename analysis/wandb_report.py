"""A W&B Report of a store's runs: trade-off panels, training time, one run set per method.

python analysis/wandb_report.py results_dir=results [project=routebench] [entity=<team>]
    [mode=offline] [out_dir=results/plots]

`mode=offline` writes the report's definition to `<out_dir>/wandb_report.json`; `mode=online` also
saves it in the project (needs `entity=` and WANDB_API_KEY). Needs
`pip install -e '.[report]'`.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # run the code of this clone, whichever clone's environment it is
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import logging
import os
from collections.abc import Sequence
from typing import Any

import pandas as pd

from analysis import tradeoff, training_time
from analysis.cli import parse, run_main
from analysis.drawing import tables
from analysis.frames import MARGIN, AnalysisError, Store, by_setting
from analysis.report import VIEWS, of_setting

log = logging.getLogger(__name__)

DEFAULTS = {"project": "routebench", "entity": "", "mode": "offline"}
INTRODUCTION = (
    "Each run is one point: a method at one target sparsity and seed. Sparsity is the share of "
    "bypassed (token, unit) pairs; FLOPs are analytic, routed over dense. The tables are those of "
    "`analysis/report.py`, from the result records."
)


def main(arguments: Sequence[str]) -> None:
    """Write the definition, and save the report where the mode says so."""
    paths, values = parse(arguments, **DEFAULTS)
    if values["mode"] not in ("offline", "online"):
        raise AnalysisError(f"mode must be offline or online, not {values['mode']!r}")
    online = values["mode"] == "online"
    if online and not (values["entity"] and os.environ.get("WANDB_API_KEY")):
        raise AnalysisError("mode=online needs entity= and WANDB_API_KEY in the environment")
    store = Store(paths.results_dir)
    report = definition(store, project=values["project"], entity=values["entity"])
    spec = report._to_model().model_dump_json(by_alias=True, exclude_none=True, indent=2)
    path = tables.write(paths.out_dir / "wandb_report.json", f"{spec}\n")
    log.info("wrote %s", path)
    if online:
        report.save()
        log.info("saved %s", report.url)


def definition(store: Store, *, project: str, entity: str) -> Any:
    """Make the report, an object of `wandb_workspaces.reports.v2`.

    Raises:
        AnalysisError: the package is not installed.
    """
    wr = _library()
    native = {tradeoff.VIEW: _tradeoffs, training_time.VIEW: _curves}
    blocks: list[Any] = [wr.P(INTRODUCTION), wr.TableOfContents()]
    rows = {view: view.rows(store) for view in VIEWS}
    for _, title, points in by_setting(store.points):
        blocks.append(wr.H1(title))
        run_sets = _run_sets(points)
        for view, own in rows.items():
            if len(part := of_setting(own, title)):
                table = tables.markdown(view.table(part)[1])
                blocks += [wr.H2(view.title), wr.P(view.note), wr.MarkdownBlock(table)]
                if view in native:
                    blocks.append(wr.PanelGrid(runsets=run_sets, panels=native[view](part)))
        blocks.append(wr.H2("Where tokens are executed"))
        blocks.append(wr.PanelGrid(runsets=run_sets, panels=_media()))
    return wr.Report(
        project=project,
        entity=entity,
        title="Token routing",
        description="Methods under one budget: quality, cost and where tokens are executed.",
        blocks=blocks,
        width="fluid",
    )


def _run_sets(points: pd.DataFrame) -> list[Any]:
    """One run set per method; the tracker writes the fingerprint to the run's configuration."""
    wr = _library()
    return [
        wr.Runset(name=str(name), filters=f"Config('fingerprint') in {list(own['fingerprint'])}")
        for name, own in points.groupby("method")
    ]


def _tradeoffs(averaged: pd.DataFrame) -> list[Any]:
    """One scatter per measure and cost."""
    wr = _library()
    pictured = averaged[averaged["measure"] != MARGIN]
    kinds: Any = pictured[["measure", "name", "shown"]].drop_duplicates()
    return [
        wr.ScatterPlot(
            title=f"{kind.shown} over {label}",
            x=wr.SummaryMetric(cost),
            y=wr.SummaryMetric(f"{kind.measure}/{kind.name}/value"),
            log_y=kind.measure == "perplexity",
        )
        for kind in kinds.sort_values(["measure", "name"], ascending=[False, True]).itertuples()
        for cost, label in tradeoff.AXES.items()
    ]


def _curves(stages: pd.DataFrame) -> list[Any]:
    """Loss of each stage that takes steps, over its own steps."""
    wr = _library()
    trained = sorted({str(name) for name in stages.loc[stages["steps"] > 0, "stage"]})
    panels: list[Any] = [
        # a stage of several targets has a curve for each
        wr.LinePlot(title=f"{name}: loss", x=f"{name}/step", metric_regex=f"^{name}/loss(_at_.*)?$")
        for name in trained
    ]
    panels.append(
        wr.BarPlot(
            title="seconds of a point",
            metrics=["seconds"],
            groupby=wr.Config("method_name"),
            groupby_aggfunc="mean",
        )
    )
    return panels


def _media() -> list[Any]:
    """The pictures and tables that the tracker keeps with each run."""
    wr = _library()
    panels: list[Any] = [wr.MediaBrowser(title="routing maps", media_keys=["routing"])]
    for name in ("sparsity_by_layer", "results", "stages"):
        panels.append(wr.WeavePanelSummaryTable(table_name=name))
    return panels


def _library() -> Any:
    try:
        import wandb_workspaces.reports.v2 as library
    except ImportError as error:
        raise AnalysisError(
            "a W&B report needs the package wandb-workspaces: pip install -e '.[report]'"
        ) from error
    return library


if __name__ == "__main__":
    run_main(main, __doc__)
