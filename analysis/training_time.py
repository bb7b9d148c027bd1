"""What each method's recipe costs, and what more of it brings.

python analysis/training_time.py results_dir=results [out_dir=results/plots]

Writes one row per stage and, of the points of `experiment=budget` (a method trained at several
`budget.scale`), the quality that each has after so many seconds of training.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # run the code of this clone, whichever clone's environment it is
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from collections.abc import Sequence
from functools import partial

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from analysis.cli import Paths, parse, run_main, write
from analysis.drawing import style, tables
from analysis.drawing.style import Looks
from analysis.frames import DENSE, RATIO, Store, joined, only_one
from analysis.groups import label
from analysis.tradeoff import scale
from analysis.view import Panel, View

GIB = 1024**3
LEVELS = (2.0, 1.5)
"""Times the dense perplexity, whose training time is asked for."""
CURVE_OF = ["line", "shown", "sparsity_target"]


def costs(part: pd.DataFrame) -> pd.DataFrame:
    """Sum the cost of each method and stage, and each method's total.

    A stage whose product several points share was paid once, by the point that did not find it in
    the cache; points that did repeat the report of that run, so that equal reports are one run.
    `ratio_to_slowest` divides a method's total by the largest total of the table.
    """
    by = ["line", "stage"]
    once = part.drop_duplicates([*by, "seconds", "tokens", "steps", "peak_memory_bytes"])
    sums = dict.fromkeys(("seconds", "tokens", "steps", "runs"), "sum")
    most = dict.fromkeys(("peak_memory_bytes", "points"), "max")
    own = part.groupby(by)
    stages = once.assign(runs=1, points=0).groupby(by).agg(sums | most)
    stages["points"] = own["fingerprint"].nunique()
    stages["fingerprints"] = own["fingerprint"].agg(joined)
    stages["order"] = own["order"].min()
    explained = [name for name in part.columns if name.startswith("explained_variance_")]
    stages[explained] = own[explained].mean()
    totals = stages.groupby("line").agg(sums | most | {"fingerprints": joined})
    totals = totals.assign(stage="total", order=float("inf")).set_index("stage", append=True)
    table = pd.concat([stages, totals]).reset_index()
    table = table.sort_values(["line", "order"], ignore_index=True).drop(columns="order")
    table["tokens_per_s"] = table["tokens"] / table["seconds"]
    table["ratio_to_slowest"] = table["seconds"].where(table["stage"] == "total")
    table["ratio_to_slowest"] /= table["ratio_to_slowest"].max()
    return table.rename(columns={"line": "method"})


def table(part: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tabulate the costs of one setting."""
    numbers = costs(part)
    columns = {
        "method": ("method", ""),
        "stage": ("stage", ""),
        "seconds": ("seconds", ".1f"),
        "x slowest": ("ratio_to_slowest", ".3f"),
        "steps": ("steps", ","),
        "tokens": ("tokens", ","),
        "tokens/s": ("tokens_per_s", ",.0f"),
        "peak GiB": ("peak", ".2f"),
        "runs": ("runs", ""),
        "points": ("points", ""),
    }
    for figure in [c for c in numbers.columns if c.startswith("explained_variance_")]:
        columns[figure.replace("_", " ", 1).replace("_", ", ")] = (figure, ".3f")
    readable = numbers.assign(peak=numbers["peak_memory_bytes"] / GIB)
    return numbers, tables.formatted(readable, columns)


VIEW = View(
    "training_time",
    "Training time",
    "A stage that several points share is counted once; x slowest: a method's total over the "
    "largest total.",
    "no method here has a training stage",
    lambda store: store.stages,
    table,
    "Cost of each method and stage",
)


def longer(store: Store) -> pd.DataFrame:
    """Take the perplexities of methods that were trained with several budgets, as `scale` says.

    A `line` is here a method with its variant, whatever it was trained for.
    """
    if store.averaged.empty:
        return store.averaged
    scales = store.points[["setting", "line"]].copy()
    found = [store.configs[name].get("budget.scale", 1.0) for name in store.points["fingerprint"]]
    scales = scales.assign(scale=found).drop_duplicates(["setting", "line"])
    own = store.averaged[(store.averaged["measure"] == "perplexity")]
    own = own[(own["line"] != DENSE) & (own["training_s"] > 0)].merge(
        scales, on=["setting", "line"]
    )
    named = own[["method", "variant"]].itertuples(index=False, name=None)
    own["line"] = [label(method, variant) for method, variant in named]
    several = own.groupby(["setting", *CURVE_OF])["scale"].transform("nunique") > 1
    return own[several].sort_values([*CURVE_OF, "training_s"])


def seconds_to(
    level: float, seconds: Sequence[float], ratios: Sequence[float]
) -> tuple[float, bool]:
    """Find when a curve first is at `level` times dense, between two points in logarithms of both.

    Args:
        seconds: of training, rising.
        ratios: perplexity over dense after them.

    Returns:
        seconds, and whether that is only an upper bound, because the first point is there already;
        NaN where no point is.
    """
    reached = np.flatnonzero(np.asarray(ratios) <= level)
    if not len(reached):
        return float("nan"), False
    place = int(reached[0])
    if place == 0:
        return float(seconds[0]), True
    x, y = np.log(seconds[place - 1 : place + 1]), np.log(ratios[place - 1 : place + 1])
    share = (y[0] - np.log(level)) / (y[0] - y[1])
    return float(np.exp(x[0] + share * (x[1] - x[0]))), False


def curve_panels(part: pd.DataFrame) -> list[Panel]:
    """Draw each text and target."""
    several = part["sparsity_target"].nunique() > 1
    return [
        Panel(
            f"{shown} over dense, against seconds of training, at sparsity {target:g}",
            partial(draw_curves, own),
            f"target {target:g}" if several else "",
        )
        for (shown, target), own in part.groupby(["shown", "sparsity_target"])
    ]


def draw_curves(own: pd.DataFrame, panel: Axes, looks: Looks) -> None:
    """Draw one line a method, with the interval of its ratio to dense."""
    panel.axhline(1.0, **style.DASHED, label=DENSE)
    for line, points in own.groupby("line"):
        look = looks[str(line)]
        panel.plot(points["training_s"], points["ratio"], label=str(line), **look)
        ends = points["ratio_low"], points["ratio_high"]
        panel.fill_between(points["training_s"], *ends, color=look["color"], alpha=0.15, lw=0)
    scale(panel, own)
    panel.set_xscale("log")
    panel.set_xlabel("training (s)")
    panel.xaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.xaxis.set_minor_formatter(NullFormatter())


def curve_table(part: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tabulate what each budget brings, and when each curve reaches `LEVELS` times dense."""
    only_one(part, [*CURVE_OF, "scale"])
    numbers, readable = [], []
    for (line, shown, target), own in part.groupby(CURVE_OF, sort=False):
        row = {"method": str(line), "on": str(shown), "target": f"{target:.2f}"}
        for point in own.to_dict("records"):
            ratio = tables.interval(
                (point["ratio"], point["ratio_low"], point["ratio_high"]), ".3f"
            )
            row[f"{point['scale']:g} x budget"] = f"{ratio} in {point['training_s']:.0f} s"
        found: dict[str, float] = {}
        for level in LEVELS:
            seconds, bound = seconds_to(level, own["training_s"].tolist(), own["ratio"].tolist())
            said = f"{'at most ' if bound else ''}{seconds:.0f}"
            row[f"s to {level:g} x dense"] = "not reached" if np.isnan(seconds) else said
            found |= {f"seconds_to_{level:g}": seconds, f"seconds_to_{level:g}_is_bound": bound}
        numbers.append(own.assign(**found))
        readable.append(row)
    columns = [*CURVE_OF, "scale", "seeds", "training_s", "value", "dense", *RATIO, *found]
    frame = pd.concat(numbers)[[*columns, "sparsity_realised", "flops_ratio", "fingerprints"]]
    return frame.rename(columns={"line": "method"}), pd.DataFrame(readable).fillna("")


CURVE = View(
    "training_curve",
    "Quality against training",
    "Each method with several times the steps and text of one budget (`budget.scale`); seconds of "
    "all its stages. Shaded: 95 % of the ratio to dense over documents, of these trained models. "
    "Seconds to a level lie between two points of a curve, never beyond its last.",
    "no method was trained with several budgets: run runners/sweep.py experiment=budget -m",
    longer,
    curve_table,
    "What each budget brings",
    curve_panels,
    more={DENSE: style.DASHED},
    share=("none", "none"),
    height_in=2.6,
)


def main(arguments: Sequence[str]) -> None:
    """Write both views; the curve where there is one."""
    paths: Paths = parse(arguments)[0]
    write(VIEW, paths)
    write(CURVE, paths, optional=True)


if __name__ == "__main__":
    run_main(main, __doc__)
