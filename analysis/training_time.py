"""What each method's recipe costs: one row per stage, as Markdown, LaTeX and CSV.

python analysis/training_time.py results_dir=results [out_dir=results/plots]
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # run the code of this clone, whichever clone's environment it is
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import logging
from typing import Any

import pandas as pd

from analysis import frames
from analysis.cli import Paths, run
from analysis.drawing import tables

log = logging.getLogger(__name__)

GIB = 1024**3


def main(paths: Paths) -> None:
    """Write one table per (model, data, budget)."""
    rows = frames.stages(frames.read_store(paths.results_dir))
    if rows.empty:
        log.info("no method of this store has a stage: no table")
        return
    for name, _, part in frames.by_setting(rows):
        for path in save(part, name, paths.out_dir / f"training_time-{name}"):
            log.info("wrote %s", path)


def save(part: pd.DataFrame, _: str, stem: Path) -> list[Path]:
    """Table of one setting, from `frames.stages`."""
    costs = cost_table(part)
    return tables.save(stem, costs, formatted(costs))


def cost_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Cost per method and stage, and each method's total.

    A stage whose product several points share was paid once, by the point that did not find it
    in the cache; points that did show the cost of that first run and are counted as `shared_by`.
    Stages that every point runs for itself (`calibrate`) are summed over the points.
    `ratio_to_slowest` divides a method's total by the largest total of the table.
    """
    out = []
    for (method, variant), own in rows.groupby(frames.SERIES, dropna=False):
        stages = [_stage(str(name), runs) for name, runs in own.groupby("stage", sort=False)]
        stages.sort(key=lambda stage: stage["order"])
        total = {
            "stage": "total",
            **{k: sum(s[k] for s in stages) for k in ("seconds", "tokens", "steps")},
            "peak_memory_bytes": max(s["peak_memory_bytes"] for s in stages),
            "runs": sum(s["runs"] for s in stages),
            "points": max(s["points"] for s in stages),
        }
        out += [{"method": frames.label(str(method), str(variant)), **s} for s in [*stages, total]]
    table = pd.DataFrame(out).drop(columns="order")
    table["tokens_per_s"] = table["tokens"] / table["seconds"]
    totals = table["seconds"].where(table["stage"] == "total")
    table["ratio_to_slowest"] = totals / totals.max()
    return table


def _stage(name: str, runs: pd.DataFrame) -> dict[str, Any]:
    """Sum over the distinct runs of a stage; a cached report repeats the run it came from."""
    distinct = runs.drop_duplicates(["seconds", "tokens", "steps", "peak_memory_bytes"])
    stage: dict[str, Any] = {
        "stage": name,
        "seconds": distinct["seconds"].sum(),
        "tokens": int(distinct["tokens"].sum()),
        "steps": int(distinct["steps"].sum()),
        "peak_memory_bytes": int(distinct["peak_memory_bytes"].max()),
        "runs": len(distinct),
        "points": runs["fingerprint"].nunique(),
        "order": runs["order"].min(),
    }
    for figure in [c for c in runs.columns if c.startswith("explained_variance_")]:
        if runs[figure].notna().any():
            stage[figure] = runs[figure].mean()
    return stage


def formatted(table: pd.DataFrame) -> pd.DataFrame:
    """The table for a reader."""
    shown = pd.DataFrame(
        {
            "method": table["method"],
            "stage": table["stage"],
            "seconds": [f"{v:.1f}" for v in table["seconds"]],
            "x slowest": ["" if pd.isna(v) else f"{v:.3f}" for v in table["ratio_to_slowest"]],
            "steps": [f"{v:,}" for v in table["steps"]],
            "tokens": [f"{v:,}" for v in table["tokens"]],
            "tokens/s": [f"{v:,.0f}" for v in table["tokens_per_s"]],
            "peak GiB": [f"{v / GIB:.2f}" for v in table["peak_memory_bytes"]],
            "runs": table["runs"],
            "points": table["points"],
        }
    )
    for figure in [c for c in table.columns if c.startswith("explained_variance_")]:
        name = "explained variance, " + figure.removeprefix("explained_variance_")
        shown[name] = ["" if pd.isna(v) else f"{v:.3f}" for v in table[figure]]
    return shown


if __name__ == "__main__":
    run(main, __doc__)
