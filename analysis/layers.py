"""Where each method bypasses: realised sparsity of every layer's attention and MLP unit.

python analysis/layers.py results_dir=results [out_dir=results/plots]
"""

from __future__ import annotations

import logging

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from analysis import frames, style, tables
from analysis.cli import Paths, run

log = logging.getLogger(__name__)

KINDS = ("attention", "mlp")
PANEL_HEIGHT_IN = 1.6


def main(paths: Paths) -> None:
    """Draw one figure and write one table per (model, data, budget)."""
    rows = frames.layers(frames.read_store(paths.results_dir))
    if rows.empty:
        log.info("no method of this store routes: no figure")
        return
    for name, title, part in frames.by_setting(rows):
        averaged = over_seeds(part)
        with style.paper():
            written = style.save(draw(averaged, title), paths.out_dir / f"layers-{name}")
        table = paths.out_dir / f"layers-{name}.csv"
        written.append(tables.write(table, averaged.to_csv(index=False)))
        written.append(tables.write(table.with_suffix(".md"), tables.markdown(summary(averaged))))
        for path in written:
            log.info("wrote %s", path)


def over_seeds(part: pd.DataFrame) -> pd.DataFrame:
    """Mean sparsity over seeds of each line, target, kind and layer."""
    named = frames.with_lines(part)
    by = ["line", "sparsity_target", "kind", "layer"]
    return named.groupby(by)["sparsity"].mean().reset_index()


def draw(averaged: pd.DataFrame, title: str) -> Figure:
    """One row of panels per target, attention left, MLP right, one line per method."""
    targets = sorted(averaged.sparsity_target.unique())
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
            chosen = averaged[(averaged.sparsity_target == target) & (averaged.kind == kind)]
            panel.axhline(float(target), color=style.REFERENCE, linestyle=":", linewidth=1)
            for line, points in chosen.groupby("line"):
                ordered = points.sort_values("layer")
                panel.plot(ordered.layer, ordered.sparsity, label=str(line), **looks[str(line)])
            panel.set_title(f"{kind}, target {target:g}")
        panels[0].set_ylabel("sparsity")
        panels[0].set_ylim(-0.03, 1.03)
    for panel in grid[-1]:
        panel.set_xlabel("layer")
    style.legend(figure, grid[0][0], title)
    return figure


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
