"""Quality against sparsity and against FLOPs: one line per method, the dense model beside it.

python analysis/tradeoff.py results_dir=results [out_dir=results/plots]
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # run the code of this clone, whichever clone's environment it is
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import logging
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogFormatterMathtext, LogLocator, NullFormatter

from analysis import frames
from analysis.bands import with_bands
from analysis.cli import Paths, run
from analysis.drawing import style, tables

log = logging.getLogger(__name__)

Looks = dict[str, dict[str, Any]]
DrawPanel = Callable[[Axes, pd.DataFrame, str, Looks], None]
AXES = {"sparsity_realised": "realised sparsity", "flops_ratio": "FLOPs (routed / dense)"}
ROW_HEIGHT_IN = 2.0
LONGEST_TICK = 1e7
"""Perplexities beyond are labelled by their power of ten."""


def main(paths: Paths) -> None:
    """Draw one figure and write one table per (model, data, budget)."""
    measured = frames.measures(frames.read_store(paths.results_dir))
    averaged = with_bands(frames.over_seeds(measured), paths.results_dir)
    for name, title, part in frames.by_setting(averaged):
        for path in save(part, title, paths.out_dir / f"tradeoff-{name}"):
            log.info("wrote %s", path)


def save(part: pd.DataFrame, title: str, stem: Path) -> list[Path]:
    """Figure and table of one setting, from `frames.over_seeds` with bands or without."""
    with style.paper():
        written = style.save(draw(part, title), stem)
    return written + tables.save(stem, part, summary(part))


def draw(part: pd.DataFrame, title: str) -> Figure:
    """One row of panels per measure, one column per cost axis."""
    part = frames.with_lines(part)
    looks = style.looks(set(part.line) - {"dense"})
    figure, grid = measure_grid(part, AXES, looks, draw_panel)
    for panel, cost in zip(grid[-1], AXES, strict=True):
        if cost == "flops_ratio":
            panel.invert_xaxis()
    style.legend(figure, grid[0][0], title)
    return figure


def measures_of(rows: pd.DataFrame) -> list[tuple[str, str]]:
    """(measure, name) pairs, perplexities first."""
    listed = {(str(m), str(n)) for m, n in rows[["measure", "name"]].itertuples(index=False)}
    return sorted(listed, key=lambda pair: (pair[0] != "perplexity", *pair))


def measure_grid(
    rows: pd.DataFrame, costs: Mapping[str, str], looks: Looks, draw: DrawPanel
) -> tuple[Figure, Any]:
    """A figure and its panels [measures, costs], each filled by `draw` and labelled.

    Args:
        costs: column of `rows` and its label.
        draw: called with (panel, rows of the measure, column of the cost, looks).
    """
    names = measures_of(rows)
    figure, grid = plt.subplots(
        len(names),
        len(costs),
        figsize=(2 * style.COLUMN_WIDTH_IN, ROW_HEIGHT_IN * len(names) + 0.7),
        squeeze=False,
        sharex="col",
        sharey="row",
        layout="constrained",
    )
    for (measure, name), axes in zip(names, grid, strict=True):
        chosen = rows[(rows["measure"] == measure) & (rows["name"] == name)]
        for cost, panel in zip(costs, axes, strict=True):
            draw(panel, chosen, cost, looks)
        scale(axes[0], measure, name)
    for panel, label in zip(grid[-1], costs.values(), strict=True):
        panel.set_xlabel(label)
    return figure, grid


def draw_panel(panel: Axes, chosen: pd.DataFrame, cost: str, looks: Looks) -> None:
    """One measure of one task or text over one cost; `chosen` has a column `line`."""
    dense = float(chosen["dense"].iloc[0])
    panel.axhline(dense, color=style.REFERENCE, linestyle=(0, (4, 2)), linewidth=1, label="dense")
    chance = chosen["chance"].dropna()
    if len(chance):
        panel.axhline(float(chance.iloc[0]), color=style.REFERENCE, linestyle=":", linewidth=1)
        panel.annotate(
            "chance",
            (0.01, float(chance.iloc[0])),
            xycoords=("axes fraction", "data"),
            xytext=(0, 2),
            textcoords="offset points",
            fontsize=6.5,
            color=style.REFERENCE,
        )
    for line, points in chosen[chosen.line != "dense"].groupby("line"):
        ordered = points.sort_values(cost)
        if "band_low" in ordered and len(ordered) > 1:
            panel.fill_between(
                ordered[cost],
                ordered["band_low"].astype(float),
                ordered["band_high"].astype(float),
                color=looks[str(line)]["color"],
                alpha=0.15,
                linewidth=0,
            )
        error = [ordered.value - ordered.low, ordered.high - ordered.value]
        panel.errorbar(
            ordered[cost],
            ordered.value,
            yerr=[e.clip(lower=0) for e in error],
            label=str(line),
            elinewidth=0.8,
            **looks[str(line)],
        )


def scale(panel: Axes, measure: str, name: str) -> None:
    """Label and scale of a measure's axis: perplexities in logarithms."""
    if measure == "accuracy":
        panel.set_ylabel(f"{name.replace('_', ' ')}\naccuracy")
        panel.set_ylim(bottom=0)
        return
    panel.set_ylabel(f"{name} perplexity")
    panel.set_yscale("log")
    low, high = panel.get_ylim()
    steps = (1.0,) if high / low > 100 else (1.0, 2.0, 5.0)
    panel.yaxis.set_major_locator(LogLocator(base=10, subs=steps))
    plain = FuncFormatter(lambda value, _: f"{value:,.0f}")
    panel.yaxis.set_major_formatter(plain if high < LONGEST_TICK else LogFormatterMathtext())
    panel.yaxis.set_minor_formatter(NullFormatter())


def summary(part: pd.DataFrame) -> pd.DataFrame:
    """One row per method and target, a column per measure, formatted."""
    rows = []
    by = [*frames.SERIES, "sparsity_target"]
    for (method, variant, target), point in part.groupby(by, dropna=False):
        first = point.iloc[0]
        row = {
            "method": frames.label(str(method), str(variant)),
            "target": f"{target:.2f}",
            "realised": f"{first.sparsity_realised:.3f}",
            "FLOPs": f"{first.flops_ratio:.3f}",
        }
        for entry in point.sort_values("measure", ascending=False).itertuples():
            row |= _cells(entry)
        rows.append(row)
    return pd.DataFrame(rows).fillna("")


def _cells(entry: Any) -> dict[str, str]:
    if entry.measure == "accuracy":
        half = (entry.high - entry.low) / 2
        return {str(entry.name): f"{entry.value:.3f} ± {half:.3f}"}
    return {
        f"{entry.name} perplexity": f"{entry.value:.2f} [{entry.low:.2f}, {entry.high:.2f}]",
        f"{entry.name} / dense": f"{entry.value / entry.dense:.3f}",
    }


if __name__ == "__main__":
    run(main, __doc__)
