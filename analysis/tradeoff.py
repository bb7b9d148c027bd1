"""Quality against sparsity and against FLOPs: one line per method, the dense model beside it.

The first table is at equal FLOPs (`analysis/equal_flops.py`), the second of every point.

python analysis/tradeoff.py results_dir=results [out_dir=results/plots]
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # run the code of this clone, whichever clone's environment it is
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from analysis import equal_flops
from analysis.cli import parse, run_main, write
from analysis.drawing import style, tables
from analysis.drawing.style import Looks
from analysis.frames import DENSE, GENERATION, MARGIN
from analysis.view import Panel, View

AXES = {"sparsity_realised": "realised sparsity", "flops_ratio": "FLOPs (routed / dense)"}
Draw = Callable[[pd.DataFrame, str, Axes, Looks], None]
FALLING = frozenset({"flops_ratio", "executed", "kv_bytes_ratio"})
"""Costs that fall to the right, so that in every picture what is cheaper lies there."""
USABLE = 10.0
"""Perplexity over dense up to which axes go; a model beyond says nothing that makes sense."""
SHADED = 6
"""Lines whose intervals are shaded in one panel, at most: the shades of more hide each other."""
TICKS = (1.0, 1.2, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0, 10.0)


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
    pictured = rows[rows["measure"] != MARGIN]
    ordered = pictured.sort_values(["measure", "name"], ascending=[False, True], kind="stable")
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
    if cost in FALLING and not panel.xaxis_inverted():  # panels above may share the axis
        panel.invert_xaxis()


def draw(chosen: pd.DataFrame, cost: str, panel: Axes, looks: Looks) -> None:
    """Draw one measure of one task or text over one cost."""
    level = 1.0 if chosen.iloc[0]["measure"] == "perplexity" else float(chosen["dense"].mean())
    panel.axhline(level, **style.DASHED, label=DENSE)
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
    drawn = chosen[(chosen["line"] != DENSE) & chosen[cost].notna()]
    shaded = drawn["line"].nunique() <= SHADED
    for line, points in heights(drawn).groupby("line"):
        ordered, look = points.sort_values(cost), looks[str(line)]
        if shaded and len(ordered) > 1:
            ends = ordered["y_low"], ordered["y_high"]
            panel.fill_between(ordered[cost], *ends, color=look["color"], alpha=0.15, lw=0)
        bars = [ordered["y"] - ordered["bar_low"], ordered["bar_high"] - ordered["y"]]
        bars = [end.clip(lower=0) for end in bars]
        panel.errorbar(
            ordered[cost], ordered["y"], yerr=bars, label=str(line), elinewidth=0.8, **look
        )


def heights(rows: pd.DataFrame) -> pd.DataFrame:
    """Add what is drawn of a measure: perplexities over dense, other measures as they are.

    `y` with `y_low` and `y_high`, its paired 95 % interval against the dense model; `bar_low` and
    `bar_high`, the spread over seeds, or that interval where there is one seed.
    """
    unit = rows["dense"].where(rows["measure"] == "perplexity", 1.0)
    low, high = (
        rows[f"ratio_{end}"].fillna(rows["dense"] + rows[f"difference_{end}"])
        for end in ("low", "high")
    )
    several = rows["seeds"] > 1
    return rows.assign(
        y=rows["value"] / unit,
        y_low=low,
        y_high=high,
        bar_low=(rows["low"] / unit).where(several, low),
        bar_high=(rows["high"] / unit).where(several, high),
    )


def scale(panel: Axes, chosen: pd.DataFrame) -> None:
    """Label and scale the axis of a measure: what is of use of it, perplexities in logarithms."""
    kind, values = chosen.iloc[0], heights(chosen)["y"]
    if kind["measure"] != "perplexity":
        named = f"{kind['name'].replace('_', ' ')}\n{kind['metric']}"
        panel.set_ylabel(kind["shown"] if kind["measure"] == GENERATION else named)
        lowest = np.nanmin([values.min(), chosen["chance"].min()])
        panel.set_ylim(bottom=max(0.0, lowest - 0.05))
        return
    panel.set_ylabel(f"{kind['shown']} / dense")
    panel.set_yscale("log")
    best = values[chosen["line"] != DENSE].min()
    most = USABLE if best < USABLE / 2 else values.max()
    panel.set_ylim(min(0.95, 0.95 * best), min(most, max(1.5, 1.15 * values.max())))
    if most <= USABLE:
        panel.yaxis.set_major_locator(FixedLocator(TICKS))
        panel.yaxis.set_minor_locator(NullLocator())
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def table(part: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tabulate one row per method and target, a column per measure."""
    readable = []
    for (line, target), point in part.groupby(["line", "sparsity_target"]):
        first = point.iloc[0]
        row = {
            "method": str(line),
            "target": f"{target:.2f}",
            "realised": tables.known(first.sparsity_realised),
            "FLOPs": f"{first.flops_ratio:.3f}",
            "tokens read": f"{first.tokens_read:,.0f}",
        }
        for entry in cast("Any", point.sort_values("measure", ascending=False).itertuples()):
            row[entry.shown] = tables.figure(entry)
            sign = "/" if entry.measure == "perplexity" else "-"
            row[f"{entry.shown} {sign} dense"] = tables.against_dense(entry)
            if entry.measure != MARGIN and not np.isnan(entry.realised_here):
                row[f"{entry.shown}, realised"] = f"{entry.realised_here:.3f}"
        readable.append(row)
    return part, pd.DataFrame(readable).fillna("")


VIEW = View(
    "tradeoff",
    "Quality against cost",
    "Shaded where lines are few, and beside `/ dense` and `- dense`: 95 % interval of the ratio or "
    "difference to dense on the same documents and items, of these trained models. Bars, and "
    "beside the figures: with several seeds, their standard deviation; with one, that interval "
    "(figures: 95 % of a perplexity alone, one standard error of an accuracy). Tokens read: in all "
    "stages, the calibration included (stage by stage under Training time). Realised: on the "
    "text that FLOPs are counted on, the first; beside a task, on what was read for it.",
    "no point was evaluated: run runners/sweep.py",
    lambda store: store.averaged,
    table,
    "Every method and target",
    panels,
    more={DENSE: style.DASHED},
)


def main(arguments: Sequence[str]) -> None:
    """Write both views."""
    paths = parse(arguments)[0]
    write(equal_flops.VIEW, paths)
    write(VIEW, paths)


if __name__ == "__main__":
    run_main(main, __doc__)
