"""Quality against sparsity and against FLOPs: one line per method, the dense model beside it.

python analysis/tradeoff.py results_dir=results [out_dir=results/plots]
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # run the code of this clone, whichever clone's environment it is
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogFormatterMathtext, LogLocator, NullFormatter

from analysis.cli import run
from analysis.drawing import style, tables
from analysis.drawing.style import Looks
from analysis.frames import DENSE, Store
from analysis.significance import with_bands
from analysis.view import Panel, View

AXES = {"sparsity_realised": "realised sparsity", "flops_ratio": "FLOPs (routed / dense)"}
Draw = Callable[[pd.DataFrame, str, Axes, Looks], None]
LONGEST_TICK = 1e7
"""Perplexities beyond are labelled by their power of ten."""


def rows(store: Store) -> pd.DataFrame:
    """Take the measures averaged over seeds, with a band where items were saved."""
    return with_bands(store.averaged, store.items)


def panels(part: pd.DataFrame) -> list[Panel]:
    """Draw each measure over each cost."""
    return measure_panels(part, AXES, draw, "{measure} over {cost}")


def measure_panels(
    rows: pd.DataFrame, costs: Mapping[str, str], draw: Draw, caption: str
) -> list[Panel]:
    """Make a panel of each measure over each cost, perplexities first.

    Args:
        costs: label by the column of `rows`.
        draw: called with the rows of a measure, the column of the cost, axes and looks.
        caption: with `{measure}` and `{cost}`.
    """
    ordered = rows.sort_values(["measure", "name"], ascending=[False, True], kind="stable")
    return [
        Panel(caption.format(measure=shown, cost=label), partial(_draw, draw, chosen, cost, label))
        for shown, chosen in ordered.groupby("shown", sort=False)
        for cost, label in costs.items()
    ]


def _draw(
    draw: Draw, chosen: pd.DataFrame, cost: str, label: str, panel: Axes, looks: Looks
) -> None:
    draw(chosen, cost, panel, looks)
    scale(panel, chosen)
    panel.set_xlabel(label)


def draw(chosen: pd.DataFrame, cost: str, panel: Axes, looks: Looks) -> None:
    """Draw one measure of one task or text over one cost."""
    panel.axhline(float(chosen["dense"].mean()), **style.DASHED, label=DENSE)
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
    for line, points in chosen[chosen["line"] != DENSE].groupby("line"):
        ordered, look = points.sort_values(cost), looks[str(line)]
        if "band_low" in ordered and len(ordered) > 1:
            low, high = ordered["band_low"].astype(float), ordered["band_high"].astype(float)
            panel.fill_between(ordered[cost], low, high, color=look["color"], alpha=0.15, lw=0)
        error = [ordered["value"] - ordered["low"], ordered["high"] - ordered["value"]]
        error = [end.clip(lower=0) for end in error]
        panel.errorbar(
            ordered[cost], ordered["value"], yerr=error, label=str(line), elinewidth=0.8, **look
        )
    if (
        cost != "sparsity_realised" and not panel.xaxis_inverted()
    ):  # panels above may share the axis
        panel.invert_xaxis()


def scale(panel: Axes, chosen: pd.DataFrame) -> None:
    """Label and scale the axis of a measure: perplexities in logarithms."""
    kind = chosen.iloc[0]
    if kind["measure"] == "accuracy":
        panel.set_ylabel(f"{kind['name'].replace('_', ' ')}\n{kind['metric']}")
        panel.set_ylim(bottom=0)
        return
    panel.set_ylabel(kind["shown"])
    panel.set_yscale("log")
    low, high = panel.get_ylim()
    steps = (1.0,) if high / low > 100 else (1.0, 2.0, 5.0)
    panel.yaxis.set_major_locator(LogLocator(base=10, subs=steps))
    plain = FuncFormatter(lambda value, _: f"{value:,.0f}")
    panel.yaxis.set_major_formatter(plain if high < LONGEST_TICK else LogFormatterMathtext())
    panel.yaxis.set_minor_formatter(NullFormatter())


def table(part: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tabulate one row per method and target, a column per measure."""
    readable = []
    for (line, target), point in part.groupby(["line", "sparsity_target"]):
        first = point.iloc[0]
        row = {
            "method": str(line),
            "target": f"{target:.2f}",
            "realised": f"{first.sparsity_realised:.3f}",
            "FLOPs": f"{first.flops_ratio:.3f}",
        }
        for entry in cast("Any", point.sort_values("measure", ascending=False).itertuples()):
            row[entry.shown] = tables.figure(entry)
            if entry.measure == "perplexity":
                row[f"{entry.name} / dense"] = f"{entry.value / entry.dense:.3f}"
        readable.append(row)
    return part, pd.DataFrame(readable).fillna("")


VIEW = View(
    "tradeoff",
    "Quality against cost",
    "Bars: 95 % bootstrap interval of a perplexity, one standard error of an accuracy; with "
    "several seeds, mean and standard deviation over seeds. Shaded: 95 % over items.",
    "no point was evaluated: run runners/sweep.py",
    rows,
    table,
    "Every method and target",
    panels,
    more={DENSE: style.DASHED},
)

if __name__ == "__main__":
    run(VIEW, __doc__)
