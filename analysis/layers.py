"""Where each method bypasses: realised sparsity of every layer's attention and MLP unit.

python analysis/layers.py results_dir=results [out_dir=results/plots]
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # run the code of this clone, whichever clone's environment it is
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import logging
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import frames
from analysis.cli import Paths, run
from analysis.drawing import style, tables

log = logging.getLogger(__name__)

KINDS = ("attention", "mlp")
PANEL_HEIGHT_IN = 1.6
MAX_TARGETS = 8


def main(paths: Paths) -> None:
    """Draw one figure and write one table per (model, data, budget)."""
    rows = frames.layers(frames.read_store(paths.results_dir))
    if rows.empty:
        log.info("no method of this store routes: no figure")
        return
    for name, title, part in frames.by_setting(rows):
        for path in save(part, title, paths.out_dir / f"layers-{name}"):
            log.info("wrote %s", path)


def save(part: pd.DataFrame, title: str, stem: Path) -> list[Path]:
    """Figure and table of one setting, from `frames.layers`."""
    averaged = over_seeds(part)
    with style.paper():
        written = style.save(draw(averaged, title), stem)
    return written + tables.save(stem, averaged, summary(averaged))


def over_seeds(part: pd.DataFrame) -> pd.DataFrame:
    """Mean sparsity over seeds of each line, target, kind and layer."""
    named = frames.with_lines(part)
    by = ["line", "sparsity_target", "kind", "layer"]
    return named.groupby(by)["sparsity"].mean().reset_index()


def drawn_targets(averaged: pd.DataFrame) -> list[float]:
    """At most `MAX_TARGETS`, from the least to the most; the table has all."""
    targets = sorted(float(t) for t in averaged.sparsity_target.unique())
    places = np.linspace(0, len(targets) - 1, min(len(targets), MAX_TARGETS))
    return [targets[round(place)] for place in places]


def draw(averaged: pd.DataFrame, title: str) -> Figure:
    """One row of panels per drawn target, attention left, MLP right, one line per method."""
    targets = drawn_targets(averaged)
    looks = style.looks(set(averaged.line))
    figure, grid = plt.subplots(
        len(targets),
        len(KINDS),
        figsize=(2 * style.COLUMN_WIDTH_IN, PANEL_HEIGHT_IN * len(targets) + 0.7),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    for target, panels in zip(targets, grid, strict=True):
        for kind, panel in zip(KINDS, panels, strict=True):
            draw_panel(panel, averaged, float(target), kind, looks)
        panels[0].set_ylabel("sparsity")
    for panel in grid[-1]:
        panel.set_xlabel("layer")
    style.legend(figure, grid[0][0], title)
    return figure


def draw_panel(
    panel: Axes, averaged: pd.DataFrame, target: float, kind: str, looks: dict[str, dict[str, Any]]
) -> None:
    """Sparsity over depth of one unit kind at one target, the target dotted."""
    chosen = averaged[(averaged.sparsity_target == target) & (averaged.kind == kind)]
    panel.axhline(target, color=style.REFERENCE, linestyle=":", linewidth=1)
    for line, points in chosen.groupby("line"):
        ordered = points.sort_values("layer")
        panel.plot(ordered.layer, ordered.sparsity, label=str(line), **looks[str(line)])
    panel.set_title(f"{kind}, target {target:g}")
    panel.set_ylim(-0.03, 1.03)


def summary(averaged: pd.DataFrame) -> pd.DataFrame:
    """One row per method and target: mean of each kind, and its least and most bypassed layers."""
    rows = []
    for (line, target), part in averaged.groupby(["line", "sparsity_target"]):
        row = {"method": str(line), "target": f"{target:.2f}"}
        for kind in KINDS:
            own = part[part.kind == kind].sort_values("sparsity", kind="stable")
            row[kind] = f"{own.sparsity.mean():.3f}"
            ends = (("least", own.iloc[0]), ("most", own.iloc[-1]))
            for word, end in ends:
                row[f"{kind}, {word} (layer)"] = f"{end.sparsity:.2f} ({int(end.layer)})"
        rows.append(row)
    return pd.DataFrame(rows)


if __name__ == "__main__":
    run(main, __doc__)
