"""Router x bypass: informed's and greedy's router, each with a skip and with a forecast.

python analysis/two_by_two.py results_dir=results [out_dir=results/plots]

Reads the points of `experiment=two_by_two` (methods `informed` and `greedy` with both values of
`method.bypass`); a row compares points that share their training and their sparsity target.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # run the code of this clone, whichever clone's environment it is
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import pandas as pd

from analysis.cli import run
from analysis.drawing import tables
from analysis.frames import RATIO, Store, joined, only_one
from analysis.view import View

ROUTERS = ("greedy", "informed")
BYPASSES = ("skip", "forecast")
ROW = ["shown", "sparsity_target", "train"]


def rows(store: Store) -> pd.DataFrame:
    """Take the perplexities of the routers; none if the store has one of them alone."""
    found = store.with_option("bypass", "train")
    found = found[found["method"].isin(ROUTERS) & found["bypass"].isin(BYPASSES)]
    return found if set(found["method"]) == set(ROUTERS) else found.iloc[:0]


def table(part: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tabulate one row per target and training.

    `<router>_<bypass>` is a perplexity, with `_ratio`, `_ratio_low` and `_ratio_high` to dense.
    """
    cell = part["method"] + "_" + part["bypass"]
    keyed = part.assign(cell=cell, train=part["train"].fillna("none").astype(str))
    only_one(keyed, [*ROW, "cell"])
    cells = [f"{router}_{bypass}" for router in ROUTERS for bypass in BYPASSES]
    ends = {"value": ""} | {name: f"_{name}" for name in RATIO}
    wide = [keyed.pivot(index=ROW, columns="cell", values=name) for name in ends]
    wide = [own.reindex(columns=cells) for own in wide]
    wide = [own.add_suffix(end) for own, end in zip(wide, ends.values(), strict=True)]
    grid = pd.concat(wide, axis=1)
    beside = keyed.groupby(ROW).agg(dense=("dense", "mean"), fingerprints=("fingerprints", joined))
    grid = grid.join(beside).reset_index()
    columns = {"on": ("shown", ""), "target": ("sparsity_target", ".2f"), "training": ("train", "")}
    shown = grid.copy()
    for name in cells:
        ratios = shown[[f"{name}_{end}" for end in RATIO]].itertuples(index=False, name=None)
        shown[name] = [tables.interval(found, ".3f") for found in ratios]
        columns[f"{name.replace('_', ' router, ')}, x dense"] = (name, "")
    return grid, tables.formatted(shown, columns | {"dense": ("dense", ".2f")})


VIEW = View(
    "two_by_two",
    "Router x bypass",
    "",
    "needs points of both informed and greedy: run runners/sweep.py experiment=two_by_two -m",
    rows,
    table,
    "Each router with each bypass",
)

if __name__ == "__main__":
    run(VIEW, __doc__)
