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
OF_WHOLE = ["of_whole", "of_whole_low", "of_whole_high"]
BY = ["method", "shown", "sparsity_target", "without"]


def rows(store: Store) -> pd.DataFrame:
    """Take the perplexities of methods that leave out a part or could, beside the whole method's.

    `of_whole`, with `of_whole_low` and `of_whole_high`: the ratio to the whole method on the same
    documents.
    """
    found = store.with_option("without")
    found = found[found["without"].notna()].reset_index(drop=True)
    found["without"] = [", ".join(parts) or WHOLE for parts in found["without"]]
    by = ["setting", *BY[:3]]
    whole = found[found["without"] == WHOLE].drop_duplicates(by).set_index(by)
    beside = whole.reindex(pd.MultiIndex.from_frame(found[by])).reset_index()
    found[OF_WHOLE] = store.ratios(found, beside)
    return found


def table(part: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tabulate one row per method, target and parts left out."""
    only_one(part, BY)
    named = part.sort_values([*BY[:3], "of_whole"], kind="stable", ignore_index=True)
    columns = {
        "method": ("method", ""),
        "target": ("sparsity_target", ".2f"),
        "without": ("without", ""),
        "realised": ("sparsity_realised", ".3f"),
        "FLOPs": ("flops_ratio", ".3f"),
        "on": ("name", ""),
        "perplexity": ("figure", ""),
        "x whole": ("beside_whole", ""),
        "x dense": ("beside_dense", ""),
        "training s": ("training_s", ".0f"),
    }
    shown = named.assign(
        figure=[tables.figure(row) for row in named.itertuples()],
        beside_whole=[
            tables.interval(found, ".3f")
            for found in named[OF_WHOLE].itertuples(index=False, name=None)
        ],
        beside_dense=[tables.against_dense(row) for row in named.itertuples()],
    )
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
