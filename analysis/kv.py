"""Perplexity against kept KV bytes: one line per method and KV policy.

python analysis/kv.py results_dir=results [out_dir=results/plots]
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # run the code of this clone, whichever clone's environment it is
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import logging
from typing import Any

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import frames
from analysis.cli import Paths, run
from analysis.drawing import style, tables

log = logging.getLogger(__name__)


def main(paths: Paths) -> None:
    """Draw one figure and write one table per (model, data, budget)."""
    measured = routed_perplexities(frames.measures(frames.read_store(paths.results_dir)))
    for name, title, part in frames.by_setting(measured):
        for path in save(part, title, paths.out_dir / f"kv-{name}"):
            log.info("wrote %s", path)


def routed_perplexities(measured: pd.DataFrame) -> pd.DataFrame:
    """The rows of `frames.measures` that this picture shows."""
    if measured.empty:
        return measured
    return measured[(measured["measure"] == "perplexity") & (measured["method"] != "dense")]


def save(part: pd.DataFrame, title: str, stem: Path) -> list[Path]:
    """Figure and table of one setting, from `routed_perplexities`."""
    rows = averaged(part)
    with style.paper():
        written = style.save(draw(rows, title), stem)
    return written + tables.save(stem, rows, formatted(rows))


def averaged(part: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds, one row per line, text and target."""
    named = frames.with_lines(part)
    by = ["line", "kv_policy", "name", "sparsity_target"]
    columns = ["sparsity_realised", "kv_bytes_ratio", "value", "dense"]
    return frames.seed_means(named, by, columns)


def draw(rows: pd.DataFrame, title: str) -> Figure:
    """Log perplexity over KV bytes (routed / dense); less memory to the right."""
    figure, panel = plt.subplots(figsize=(style.COLUMN_WIDTH_IN * 1.4, 2.6), layout="constrained")
    draw_panel(panel, rows, style.looks(set(rows.line)))
    figure.legend(title=title, title_fontsize=8, loc="outside upper center", ncols=2, frameon=False)
    return figure


def draw_panel(panel: Axes, rows: pd.DataFrame, looks: dict[str, dict[str, Any]]) -> None:
    """The curves of one text."""
    panel.axhline(
        float(rows.dense.iloc[0]), color=style.REFERENCE, linestyle="--", linewidth=1, label="dense"
    )
    for line, points in rows.groupby("line"):
        ordered = points.sort_values("sparsity_target")
        panel.plot(ordered.kv_bytes_ratio, ordered.value, label=str(line), **looks[str(line)])
    panel.set_yscale("log")
    panel.invert_xaxis()
    panel.set_xlabel("KV bytes (routed / dense)")
    panel.set_ylabel("perplexity")


def formatted(rows: pd.DataFrame) -> pd.DataFrame:
    """The table for a reader."""
    return pd.DataFrame(
        {
            "method": rows["line"],
            "KV policy": rows["kv_policy"],
            "target": [f"{v:.2f}" for v in rows["sparsity_target"]],
            "KV bytes": [f"{v:.3f}" for v in rows["kv_bytes_ratio"]],
            "perplexity": [f"{v:.2f}" for v in rows["value"]],
            "x dense": [f"{v:.2f}" for v in rows["value"] / rows["dense"]],
        }
    )


if __name__ == "__main__":
    run(main, __doc__)
