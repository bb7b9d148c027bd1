"""Which points no other point beats: quality against cost, better and cheaper at once.

python analysis/pareto.py results_dir=results [out_dir=results/plots]

A point is on the front if no contender has at most its cost and at least its quality (and one of
the two better). The dense model is a contender at cost 1; a method that decides by the true error
(the oracle) is none.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # run the code of this clone, whichever clone's environment it is
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from analysis.cli import run
from analysis.drawing import style, tables
from analysis.drawing.style import Looks
from analysis.frames import DENSE, DIFFERENCE, MARGIN, MEASURE, RATIO, Store, joined
from analysis.tradeoff import heights, measure_panels
from analysis.view import STAR, Panel, View

COSTS = {"flops_ratio": "FLOPs (routed / dense)", "executed": "executed share (1 - sparsity)"}


def rows(store: Store) -> pd.DataFrame:
    """Give the contenders of each setting `executed` and, per cost, `front_<cost>`."""
    measured = store.averaged
    if measured.empty:
        return measured
    measured = measured[measured["measure"] != MARGIN]
    found = with_dense(measured)
    found = found[~found["true_error"]].reset_index(drop=True)
    found["executed"] = 1.0 - found["sparsity_realised"]
    for cost in COSTS:
        found[f"front_{cost}"] = False
        for (_, measure, _), same in found.groupby(["setting", "measure", "shown"]):
            loss = same["value"] if measure == "perplexity" else -same["value"]
            known = same[cost].notna()  # not of a method that is compared by FLOPs only
            front = undominated(same.loc[known, cost], loss[known])
            found.loc[same.index[known], f"front_{cost}"] = front
    return found


def with_dense(measured: pd.DataFrame) -> pd.DataFrame:
    """Make the dense model a point of each measure, without an interval if no record is its own."""
    by = ["setting", "model", "data", "budget", *MEASURE]
    beside = measured.groupby(by).agg({"dense": "mean", "fingerprints": joined}).reset_index()
    beside = beside.assign(value=beside["dense"], low=np.nan, high=np.nan)
    found = pd.concat([measured[measured["line"] == DENSE], beside], ignore_index=True)
    at_one = {"flops_ratio": 1.0, "sparsity_realised": 0.0, "sparsity_target": 0.0}
    found = found.drop_duplicates(["setting", *MEASURE])
    perplexity = found["measure"] == "perplexity"
    against = dict.fromkeys(RATIO, np.where(perplexity, 1.0, np.nan))
    against |= dict.fromkeys(DIFFERENCE, np.where(perplexity, np.nan, 0.0))
    named: dict[str, Any] = {
        "method": DENSE,
        "line": DENSE,
        "variant": "",
        "role": "",
        "true_error": False,
    }
    dense = found.assign(**at_one, **against, **named)
    return pd.concat([measured[measured["line"] != DENSE], dense], ignore_index=True)


def undominated(cost: pd.Series, loss: pd.Series) -> pd.Series:
    """Find each point that no other matches in both and beats in one; less is better.

    Equal points are on the front together.
    """
    order = pd.DataFrame({"cost": cost, "loss": loss}).sort_values(["cost", "loss"])
    cheaper = order.groupby("cost")["loss"].min().cummin().shift(fill_value=float("inf"))
    best_here = order.groupby("cost")["loss"].transform("min")
    kept = (order["loss"] == best_here) & (order["loss"] < order["cost"].map(cheaper))
    return kept.reindex(cost.index)


def panels(part: pd.DataFrame) -> list[Panel]:
    """Draw the front of each measure over each cost."""
    return measure_panels(part, COSTS, draw, "Front of {measure} over {cost}")


def draw(chosen: pd.DataFrame, cost: str, panel: Axes, looks: Looks) -> None:
    """Draw every point faint, those on the front full and joined by steps."""
    drawn = heights(chosen).sort_values(cost)
    front = drawn[drawn[f"front_{cost}"]]
    panel.step(front[cost], front["y"], where="post", color=style.REFERENCE, lw=1, label="front")
    for line, points in drawn.groupby("line"):
        look = looks[str(line)]
        panel.plot(points[cost], points["y"], label=str(line), alpha=0.35, linewidth=0.6, **look)
        own = look | {"linestyle": ""}
        best = points[points[f"front_{cost}"]]
        bars = [best["y"] - best["bar_low"], best["bar_high"] - best["y"]]
        bars = [end.clip(lower=0) for end in bars]
        panel.errorbar(best[cost], best["y"], yerr=bars, elinewidth=0.8, **own)


def table(part: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tabulate the points on a front, cheapest first: one row per cost, measure and point."""
    columns = [*MEASURE, "line", "sparsity_target", "sparsity_realised", "flops_ratio", "value"]
    columns += ["low", "high", "dense", *RATIO, *DIFFERENCE, "seeds", "fingerprints"]
    parts = []
    for cost, label in COSTS.items():
        chosen = part[part[f"front_{cost}"]].sort_values(["measure", "name", cost])
        parts.append(chosen[columns].assign(cost=cost, over=label.partition(" (")[0]))
    fronts = pd.concat(parts, ignore_index=True).rename(columns={"line": "method"})
    readable = tables.formatted(
        fronts.assign(
            figure=[tables.figure(row) for row in fronts.itertuples()],
            against=[tables.against_dense(row) for row in fronts.itertuples()],
        ),
        {
            "front of": ("shown", ""),
            "over": ("over", ""),
            "method": ("method", ""),
            "target": ("sparsity_target", ".2f"),
            "realised": ("sparsity_realised", ".3f"),
            "FLOPs": ("flops_ratio", ".3f"),
            "value": ("figure", ""),
            "/ or - dense": ("against", ""),
        },
    )
    return fronts.drop(columns="over"), readable


VIEW = View(
    "pareto",
    "Pareto front",
    "Full: no other point has at most this cost and at least this quality. Faint: some other point "
    "has. Methods that decide by the true error do not take part. Points whose intervals against "
    "dense overlap may change places on other text.",
    "no point was evaluated: run runners/sweep.py",
    rows,
    table,
    "Points on a front, cheapest first",
    panels,
    mark={"linestyle": ""},
    more={DENSE: STAR, "front": {"color": style.REFERENCE, "linewidth": 1}},
)

if __name__ == "__main__":
    run(VIEW, __doc__)
