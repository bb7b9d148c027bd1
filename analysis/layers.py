"""Where each method bypasses: realised sparsity of every layer's attention and MLP unit.

python analysis/layers.py results_dir=results [out_dir=results/plots]
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # run the code of this clone, whichever clone's environment it is
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from functools import partial

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from analysis.cli import run
from analysis.drawing import style
from analysis.drawing.style import Looks
from analysis.frames import Store
from analysis.view import Panel, View

KINDS = ("attention", "mlp")
MAX_TARGETS = 8


def rows(store: Store) -> pd.DataFrame:
    """Average the sparsity of each layer over seeds."""
    return store.over_seeds(store.layers, ["kind", "layer"], ["sparsity"])


def panels(part: pd.DataFrame) -> list[Panel]:
    """Draw sparsity over depth, a row a target, attention left and MLP right.

    At most `MAX_TARGETS`, from the least to the most; the table has all.
    """
    targets = sorted(float(target) for target in part["sparsity_target"].unique())
    places = np.linspace(0, len(targets) - 1, min(len(targets), MAX_TARGETS))
    made = []
    for target in [targets[round(place)] for place in places]:
        for kind in KINDS:
            chosen = part[(part["sparsity_target"] == target) & (part["kind"] == kind)]
            caption = f"{kind}, target {target:g}"
            made.append(Panel(caption, partial(draw, chosen, target), caption))
    return made


def draw(chosen: pd.DataFrame, target: float, panel: Axes, looks: Looks) -> None:
    """Draw sparsity over depth of one unit kind at one target, the target dotted."""
    panel.axhline(target, color=style.REFERENCE, linestyle=":", linewidth=1)
    for line, points in chosen.groupby("line"):
        ordered, look = points.sort_values("layer"), looks[str(line)]
        panel.plot(ordered["layer"], ordered["sparsity"], label=str(line), **look)
    panel.set_ylim(-0.03, 1.03)
    panel.set_xlabel("layer")
    panel.set_ylabel("sparsity")


def table(part: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tabulate mean of each kind, and the least and most bypassed layers, per method and target."""
    readable = []
    for (line, target), point in part.groupby(["line", "sparsity_target"]):
        row = {"method": str(line), "target": f"{target:.2f}"}
        for kind in KINDS:
            own = point[point["kind"] == kind].sort_values("sparsity", kind="stable")
            row[kind] = f"{own['sparsity'].mean():.3f}"
            for word, end in (("least", own.iloc[0]), ("most", own.iloc[-1])):
                row[f"{kind}, {word} (layer)"] = f"{end.sparsity:.2f} ({int(end.layer)})"
        readable.append(row)
    return part, pd.DataFrame(readable)


VIEW = View(
    "layers",
    "Sparsity by layer",
    "Share of tokens that bypass each unit; dotted: the target of the whole model.",
    "no method here routes",
    rows,
    table,
    "Mean of each kind, least and most bypassed layers",
    panels,
    share=(True, True),
    height_in=1.6,
    ends=False,
)

if __name__ == "__main__":
    run(VIEW, __doc__)
