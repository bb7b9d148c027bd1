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

import logging

import pandas as pd

from analysis import frames
from analysis.cli import AnalysisError, Paths, run
from analysis.drawing import tables

log = logging.getLogger(__name__)

ROUTERS = ("greedy", "informed")
BYPASSES = ("skip", "forecast")


def main(paths: Paths) -> None:
    """Write one table per (model, data, budget) that has points of both routers."""
    records = frames.read_store(paths.results_dir)
    measured = frames.measures(records)
    chosen = frames.options(records).reindex(columns=["fingerprint", "bypass", "train"])
    joined = measured[measured.measure == "perplexity"].merge(chosen, on="fingerprint")
    joined = joined[joined.method.isin(ROUTERS) & joined.bypass.isin(BYPASSES)]
    if set(joined.method) != set(ROUTERS):
        raise AnalysisError(
            "the 2 x 2 needs points of both informed and greedy: "
            "run runners/sweep.py experiment=two_by_two -m"
        )
    for name, _, part in frames.by_setting(joined):
        stem = f"two_by_two-{name}"
        grid = cells(part)
        for path in tables.save(paths.out_dir / stem, grid, formatted(grid)):
            log.info("wrote %s", path)


def cells(part: pd.DataFrame) -> pd.DataFrame:
    """One row per target and training, a column `<router>_<bypass>` of perplexity (seed mean)."""
    keyed = part.assign(
        cell=part.method + "_" + part.bypass, train=part.train.fillna("none").astype(str)
    )
    row = ["name", "sparsity_target", "train"]
    means = frames.seed_means(keyed, [*row, "cell"], ["value", "dense"])
    order = [f"{router}_{bypass}" for router in ROUTERS for bypass in BYPASSES]
    wide = means.pivot(index=row, columns="cell", values="value").reindex(columns=order)
    return wide.assign(dense=means.groupby(row)["dense"].mean()).reset_index()


def formatted(grid: pd.DataFrame) -> pd.DataFrame:
    """The table for a reader."""
    shown = pd.DataFrame(
        {
            "text": grid["name"],
            "target": [f"{v:.2f}" for v in grid["sparsity_target"]],
            "training": grid["train"],
        }
    )
    for router in ROUTERS:
        for bypass in BYPASSES:
            column = grid[f"{router}_{bypass}"]
            shown[f"{router} router, {bypass}"] = ["" if pd.isna(v) else f"{v:.2f}" for v in column]
    shown["dense"] = [f"{v:.2f}" for v in grid["dense"]]
    return shown


if __name__ == "__main__":
    run(main, __doc__)
