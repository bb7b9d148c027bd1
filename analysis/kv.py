"""Perplexity against kept KV bytes: one line per method and KV policy.

python analysis/kv.py results_dir=results [out_dir=results/plots]
"""

from __future__ import annotations

import logging

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from analysis import frames, style, tables
from analysis.cli import Paths, run

log = logging.getLogger(__name__)


def main(paths: Paths) -> None:
    """Draw one figure and write one table per (model, data, budget)."""
    measured = frames.measures(frames.read_store(paths.results_dir))
    measured = measured[(measured.measure == "perplexity") & (measured.method != "dense")]
    for name, title, part in frames.by_setting(measured):
        rows = averaged(part)
        with style.paper():
            written = style.save(draw(rows, title), paths.out_dir / f"kv-{name}")
        table = paths.out_dir / f"kv-{name}.csv"
        written.append(tables.write(table, rows.to_csv(index=False)))
        written.append(tables.write(table.with_suffix(".md"), tables.markdown(formatted(rows))))
        for path in written:
            log.info("wrote %s", path)


def averaged(part: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds, one row per line, text and target."""
    named = frames.with_lines(part)
    by = ["line", "kv_policy", "name", "sparsity_target"]
    columns = ["sparsity_realised", "kv_bytes_ratio", "value", "dense"]
    return named.groupby(by)[columns].mean().reset_index()


def draw(rows: pd.DataFrame, title: str) -> Figure:
    """Log perplexity over KV bytes (routed / dense); less memory to the right."""
    looks = style.looks(set(rows.line))
    figure, panel = plt.subplots(figsize=(style.COLUMN_WIDTH_IN * 1.4, 2.6), layout="constrained")
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
    figure.legend(title=title, title_fontsize=8, loc="outside upper center", ncols=2, frameon=False)
    return figure


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
