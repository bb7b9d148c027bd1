"""What each method's recipe costs: one row per stage, as Markdown, LaTeX and CSV.

python analysis/training_time.py results_dir=results [out_dir=results/plots]
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # run the code of this clone, whichever clone's environment it is
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import pandas as pd

from analysis.cli import run
from analysis.drawing import tables
from analysis.frames import joined
from analysis.view import View

GIB = 1024**3


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

if __name__ == "__main__":
    run(VIEW, __doc__)
