"""Measured speed-up against sparsity, with the bound of FLOPs or bytes as a thin dotted line.

python analysis/speedup.py results_dir=results [out_dir=results/plots]
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # run the code of this clone, whichever clone's environment it is
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from functools import partial
from typing import Any, cast

import pandas as pd
from matplotlib.axes import Axes

from analysis.cli import run
from analysis.drawing import style, tables
from analysis.drawing.style import Looks
from analysis.frames import HOW
from analysis.view import Panel, View

CASE = ["phase", "tokens", "batch", *HOW[2:]]
"""What a panel holds: cases that were timed alike. Drawn decisions are lines of their own."""
BOUND: dict[str, Any] = {
    "color": style.REFERENCE,
    "linestyle": ":",
    "linewidth": 0.8,
    "marker": "_",  # one point draws no line
}


def panels(part: pd.DataFrame) -> list[Panel]:
    """Draw each phase, length, batch and way to measure, prefill first."""
    made = []
    spread = part.groupby("phase")[CASE[3:]].nunique().max()
    ways = [column for column in CASE[3:] if spread[column] > 1]
    ordered = part.sort_values(CASE, ascending=[False, *[True] * (len(CASE) - 1)])
    for (phase, tokens, batch, *_), chosen in ordered.groupby(CASE, sort=False):
        said = "".join(f", {column} {chosen[column].iloc[0]}" for column in ways)
        caption = f"{phase}, batch {batch}, {tokens} tokens{said}"
        made.append(Panel(caption, partial(draw, chosen), caption))
    return made


def draw(chosen: pd.DataFrame, panel: Axes, looks: Looks) -> None:
    """Draw speed-up over sparsity of one case, and its bound."""
    panel.axhline(1.0, color=style.REFERENCE, linestyle=":", linewidth=1)
    for line, points in chosen.groupby("line"):
        ordered, look = points.sort_values("sparsity"), looks[str(line)]
        speedup, at = ordered["speedup"], ordered["sparsity"]
        error = [speedup - ordered["speedup_p20"], ordered["speedup_p80"] - speedup]
        error = [end.clip(lower=0) for end in error]
        panel.errorbar(at, speedup, yerr=error, label=str(line), elinewidth=0.8, **look)
        panel.plot(at, ordered["bound"], **BOUND | {"color": look["color"]}, label="bound")
    panel.set_xlabel("realised sparsity")
    panel.set_ylabel("speed-up over dense")


def table(part: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tabulate one row per point and case."""
    order = [*CASE[:3], "method", "line", "sparsity", *HOW]
    ordered = part.sort_values(order, ascending=[False, *[True] * (len(order) - 1)])
    spread = [
        f"{row.speedup:.3f} [{row.speedup_p20:.3f}, {row.speedup_p80:.3f}]"
        for row in cast("Any", ordered.itertuples())
    ]
    columns = {
        "phase": ("phase", ""),
        "tokens": ("tokens", ""),
        "batch": ("batch", ""),
        "method": ("line", ""),
        "sparsity": ("sparsity", ".3f"),
        "dense tokens/s": ("dense_tps", ",.1f"),
        "routed tokens/s": ("routed_tps", ",.1f"),
        "speed-up": ("spread", ""),
        "bound": ("bound", ".3f"),
        "efficiency": ("efficiency", ".3f"),
        **{column: (column, "") for column in HOW if (part[column] != "").any()},
    }
    return part, tables.formatted(ordered.assign(spread=spread), columns)


VIEW = View(
    "speedup",
    "Speed",
    "Dense and routed in turn in one process; speed-up is the ratio of the tokens per second "
    "shown, bars the 20th to 80th percentile of single pairs. Thin and dotted: the bound, of FLOPs "
    "for prefill and of bytes read for decode. [random decisions]: the router runs, a draw "
    "decides.",
    "nothing was timed: python runners/speed.py method=<name> sparsity=<target>",
    lambda store: store.speed,
    table,
    "Every timed case",
    panels,
    more={"bound": BOUND},
    share=(True, False),
    height_in=1.9,
)

if __name__ == "__main__":
    run(VIEW, __doc__)
