"""Which points no other point beats: quality against cost, better and cheaper at once.

python analysis/pareto.py results_dir=results [out_dir=results/plots]

A point is on the front if no contender has at most its cost and at least its quality (and one of
the two better). The dense model is a contender at cost 1; an upper bound (the oracle) is none.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # run the code of this clone, whichever clone's environment it is
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import logging
from typing import Any, cast

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import frames
from analysis.cli import Paths, run
from analysis.drawing import style, tables
from analysis.tradeoff import Looks, measure_grid

log = logging.getLogger(__name__)

COSTS = {"flops_ratio": "FLOPs (routed / dense)", "executed": "executed share (1 - sparsity)"}
DENSE = "dense"


def main(paths: Paths) -> None:
    """Draw one figure and write one table per (model, data, budget)."""
    measured = frames.over_seeds(frames.measures(frames.read_store(paths.results_dir)))
    for name, title, part in frames.by_setting(measured):
        for path in save(part, title, paths.out_dir / f"pareto-{name}"):
            log.info("wrote %s", path)


def save(part: pd.DataFrame, title: str, stem: Path) -> list[Path]:
    """Figure and table of one setting, from `frames.over_seeds`."""
    rows = contenders(part)
    with style.paper():
        written = style.save(draw(rows, title), stem)
    fronts = front_table(rows)
    return written + tables.save(stem, fronts, formatted(fronts))


def contenders(part: pd.DataFrame) -> pd.DataFrame:
    """The points of one setting with `line`, `executed` and, per cost, `front_<cost>`.

    Args:
        part: rows of `frames.over_seeds`.
    """
    rows = frames.with_lines(part)
    rows = rows[~rows["method"].str.endswith(frames.UPPER_BOUND)]
    rows = pd.concat([rows[rows["line"] != DENSE], _dense(part)], ignore_index=True)
    rows["executed"] = 1.0 - rows["sparsity_realised"]
    for cost in COSTS:
        rows[f"front_{cost}"] = False
        for (measure, _), own in rows.groupby(["measure", "name"]):
            better_low = measure == "perplexity"
            loss = own["value"] if better_low else -own["value"]
            rows.loc[own.index, f"front_{cost}"] = undominated(own[cost], loss)
    return rows


def _dense(part: pd.DataFrame) -> pd.DataFrame:
    """The dense model as one point of each measure, without an interval if no record is its own."""
    by = ["measure", "name"]
    beside = part.groupby(by, as_index=False).first()
    beside = beside.assign(value=beside["dense"], low=None, high=None)
    own = part[part["method"] == DENSE]
    rows = pd.concat([own, beside.astype({"low": float, "high": float})], ignore_index=True)
    at_one = {"flops_ratio": 1.0, "sparsity_realised": 0.0, "sparsity_target": 0.0}
    named = {"method": DENSE, "variant": "", "line": DENSE}
    return rows.drop_duplicates(by).assign(**at_one, **named)


def undominated(cost: pd.Series, loss: pd.Series) -> pd.Series:
    """True for each point that no other matches in both and beats in one; less is better.

    Equal points are on the front together.
    """
    order = pd.DataFrame({"cost": cost, "loss": loss}).sort_values(["cost", "loss"])
    cheaper = order.groupby("cost")["loss"].min().cummin().shift(fill_value=float("inf"))
    best_here = order.groupby("cost")["loss"].transform("min")
    kept = (order["loss"] == best_here) & (order["loss"] < order["cost"].map(cheaper))
    return kept.reindex(cost.index)


def draw(rows: pd.DataFrame, title: str) -> Figure:
    """One row of panels per measure, one column per cost."""
    looks = style.looks(set(rows["line"]) - {DENSE})
    figure, grid = measure_grid(rows, COSTS, looks, draw_panel)
    style.legend(figure, grid[0][0], title)
    return figure


def draw_panel(panel: Axes, chosen: pd.DataFrame, cost: str, looks: Looks) -> None:
    """Every point faint, those on the front full and joined by steps."""
    front = chosen[chosen[f"front_{cost}"]].sort_values(cost)
    panel.step(
        front[cost],
        front["value"],
        where="post",
        color=style.REFERENCE,
        linewidth=1,
        label="front",
    )
    for line, points in chosen.groupby("line"):
        own = look(str(line), looks) | {"linestyle": ""}
        panel.plot(points[cost], points["value"], **own, alpha=0.3)
        best = points[points[f"front_{cost}"]]
        panel.plot(best[cost], best["value"], **own, label=str(line))


def look(line: str, looks: Looks) -> dict[str, Any]:
    """A line's look; the dense model, which has none of its own, is a star."""
    return looks.get(line, {"color": style.REFERENCE, "marker": "*"})


def front_table(rows: pd.DataFrame) -> pd.DataFrame:
    """The points on a front, cheapest first: one row per cost, measure and point."""
    columns = ["line", "sparsity_target", "sparsity_realised", "flops_ratio"]
    columns += ["value", "low", "high", "dense", "seeds"]
    parts = []
    for cost in COSTS:
        chosen = rows[rows[f"front_{cost}"]].sort_values(["measure", "name", cost])
        parts.append(chosen[["measure", "name", *columns]].assign(cost=cost))
    return pd.concat(parts, ignore_index=True).rename(columns={"line": "method"})


def formatted(fronts: pd.DataFrame) -> pd.DataFrame:
    """The table for a reader."""
    listed = cast("Any", fronts.itertuples())
    return pd.DataFrame(
        [
            {
                "front of": f"{row.name} {row.measure}",
                "over": COSTS[row.cost].partition(" (")[0],
                "method": row.method,
                "target": f"{row.sparsity_target:.2f}",
                "realised": f"{row.sparsity_realised:.3f}",
                "FLOPs": f"{row.flops_ratio:.3f}",
                "value": _value(row),
            }
            for row in listed
        ]
    )


def _value(row: Any) -> str:
    digits = 2 if row.measure == "perplexity" else 3
    text = f"{row.value:.{digits}f}"
    return text if pd.isna(row.low) else f"{text} [{row.low:.{digits}f}, {row.high:.{digits}f}]"


if __name__ == "__main__":
    run(main, __doc__)
