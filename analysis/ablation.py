"""What each part of a method brings: perplexity without it, at one budget and target.

python analysis/ablation.py results_dir=results [out_dir=results/plots]

Reads the points of `experiment=ablation`: a method with an option `without`, one part left out.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # run the code of this clone, whichever clone's environment it is
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import pandas as pd

from analysis.cli import run
from analysis.drawing import tables
from analysis.frames import Store, only_one
from analysis.view import View

WHOLE = "all parts"
BY = ["method", "shown", "sparsity_target", "without"]


def rows(store: Store) -> pd.DataFrame:
    """Take the perplexities of methods that leave out a part or could."""
    found = store.with_option("without")
    return found[found["without"].notna()]


def table(part: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tabulate one row per method, target and parts left out; `ratio` is to the whole method."""
    named = part.assign(without=[", ".join(parts) or WHOLE for parts in part["without"]])
    only_one(named, BY)
    whole = named[named["without"] == WHOLE].set_index(BY[:3])["value"]
    keys = pd.MultiIndex.from_frame(named[BY[:3]])
    named["ratio"] = named["value"] / whole.reindex(keys).to_numpy()
    named = named.sort_values([*BY[:3], "ratio"], kind="stable", ignore_index=True)
    columns = {
        "method": ("method", ""),
        "target": ("sparsity_target", ".2f"),
        "without": ("without", ""),
        "realised": ("sparsity_realised", ".3f"),
        "FLOPs": ("flops_ratio", ".3f"),
        "on": ("name", ""),
        "perplexity": ("figure", ""),
        "x whole": ("ratio", ".2f"),
        "x dense": ("of_dense", ".2f"),
        "training s": ("training_s", ".0f"),
    }
    figures = [tables.figure(row) for row in named.itertuples()]
    shown = named.assign(figure=figures, of_dense=named["value"] / named["dense"])
    return named, tables.formatted(shown, columns)


VIEW = View(
    "ablation",
    "Ablation",
    "",
    "no point leaves out a part: run runners/sweep.py experiment=ablation -m",
    rows,
    table,
    "Each part left out",
)

if __name__ == "__main__":
    run(VIEW, __doc__)
