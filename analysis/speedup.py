"""Measured speed-up against sparsity, with the bound of FLOPs or bytes as a dashed line.

python analysis/speedup.py results_dir=results [out_dir=results/plots]
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # run the code of this clone, whichever clone's environment it is
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import logging
from typing import Any, cast

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import frames
from analysis.cli import AnalysisError, Paths, run
from analysis.drawing import style, tables

log = logging.getLogger(__name__)

PANEL_HEIGHT_IN = 1.9
COLUMNS = 2
CASE = ["phase", "tokens", "batch"]
Case = tuple[str, int, int]


def main(paths: Paths) -> None:
    """Draw one figure and write one table per (model, data, budget)."""
    rows = frames.speed(frames.read_store(paths.results_dir))
    if rows.empty:
        raise AnalysisError(f"no speed in {paths.results_dir}; run runners/speed.py first")
    for name, title, part in frames.by_setting(rows):
        for path in save(part, title, paths.out_dir / f"speedup-{name}"):
            log.info("wrote %s", path)


def save(part: pd.DataFrame, title: str, stem: Path) -> list[Path]:
    """Figure and table of one setting, from `frames.speed`."""
    with style.paper():
        written = style.save(draw(part, title), stem)
    return written + tables.save(stem, part, summary(part))


def draw(part: pd.DataFrame, title: str) -> Figure:
    """One panel per phase, length and batch; one line per method, its bound dashed."""
    part = frames.with_lines(part)
    listed = cases(part)
    looks = style.looks(set(part.line))
    rows = -(-len(listed) // COLUMNS)
    figure, grid = plt.subplots(
        rows,
        COLUMNS,
        figsize=(2 * style.COLUMN_WIDTH_IN, PANEL_HEIGHT_IN * rows + 0.7),
        squeeze=False,
        sharex=True,
        layout="constrained",
    )
    for panel, case in zip(grid.flat, listed, strict=False):
        draw_panel(panel, part, case, looks)
    for panel in grid.flat[len(listed) :]:
        panel.set_visible(False)
    for panel in grid[:, 0]:
        panel.set_ylabel("speed-up over dense")
    for panel in grid[-1]:
        panel.set_xlabel("realised sparsity")
    style.legend(figure, grid[0][0], title)
    return figure


def cases(part: pd.DataFrame) -> list[Case]:
    """What was timed, prefill first."""
    listed = {(str(p), int(t), int(b)) for p, t, b in part[CASE].itertuples(index=False)}
    return sorted(listed, key=lambda case: (case[0] != "prefill", *case[1:]))


def draw_panel(
    panel: Axes, part: pd.DataFrame, case: Case, looks: dict[str, dict[str, Any]]
) -> None:
    """Speed-up over sparsity of one case; `part` has a column `line`."""
    phase, tokens, batch = case
    chosen = part[(part.phase == phase) & (part.tokens == tokens) & (part.batch == batch)]
    panel.set_title(f"{phase}, batch {batch}, {tokens} tokens")
    panel.axhline(1.0, color=style.REFERENCE, linestyle=":", linewidth=1)
    for line, points in chosen.groupby("line"):
        ordered, look = points.sort_values("sparsity"), looks[str(line)] | {"linestyle": "-"}
        low, high = ordered.speedup - ordered.speedup_p20, ordered.speedup_p80 - ordered.speedup
        panel.errorbar(
            ordered.sparsity,
            ordered.speedup,
            yerr=[low.clip(lower=0), high.clip(lower=0)],
            label=str(line),
            elinewidth=0.8,
            **look,
        )
        panel.plot(
            ordered.sparsity,
            ordered.bound,
            color=look["color"],
            linestyle=(0, (4, 2)),
            linewidth=1,
            marker="_",  # one point alone draws no line
            label="bound",
        )


def summary(part: pd.DataFrame) -> pd.DataFrame:
    """One row per point and case, formatted."""
    order = ["phase", "tokens", "batch", "method", "sparsity"]
    rows = [
        {
            "phase": row.phase,
            "tokens": row.tokens,
            "batch": row.batch,
            "method": frames.label(str(row.method), str(row.variant)),
            "sparsity": f"{row.sparsity:.3f}",
            "dense tokens/s": f"{row.dense_tps:,.1f}",
            "routed tokens/s": f"{row.routed_tps:,.1f}",
            "speed-up": f"{row.speedup:.3f} [{row.speedup_p20:.3f}, {row.speedup_p80:.3f}]",
            "bound": f"{row.bound:.3f}",
            "efficiency": f"{row.efficiency:.3f}",
        }
        for row in cast("Any", part.sort_values(order, ascending=[False, *[True] * 4]).itertuples())
    ]
    return pd.DataFrame(rows)


if __name__ == "__main__":
    run(main, __doc__)
