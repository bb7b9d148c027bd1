"""What each part of a method brings: perplexity without it, at one budget and target.

python analysis/ablation.py results_dir=results [out_dir=results/plots]

Reads the points of `experiment=ablation`: a method with an option `without`, one part left out.
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

WHOLE = "all parts"


def main(paths: Paths) -> None:
    """Write one table per (model, data, budget)."""
    records = frames.read_store(paths.results_dir)
    measured = frames.measures(records)
    chosen = frames.options(records)
    if "without" not in chosen:
        raise AnalysisError(
            "no point of this store leaves out a part: run runners/sweep.py experiment=ablation -m"
        )
    chosen = chosen[chosen["without"].notna()][["fingerprint", "without"]]
    seconds = frames.stages(records).groupby("fingerprint")["seconds"].sum()
    joined = measured[measured.measure == "perplexity"].merge(chosen, on="fingerprint")
    joined["training_s"] = joined["fingerprint"].map(seconds)
    for name, _, part in frames.by_setting(joined):
        stem = f"ablation-{name}"
        rows = ablation(part)
        for path in tables.save(paths.out_dir / stem, rows, formatted(rows)):
            log.info("wrote %s", path)


def ablation(part: pd.DataFrame) -> pd.DataFrame:
    """One row per method, target and set of parts left out; `ratio` is to the whole method.

    Figures are means over seeds.
    """
    named = part.assign(without=[", ".join(parts) or WHOLE for parts in part["without"]])
    by = ["method", "name", "sparsity_target", "without"]
    columns = ["sparsity_realised", "flops_ratio", "value", "low", "high", "dense", "training_s"]
    rows = frames.seed_means(named, by, columns)
    whole = rows[rows.without == WHOLE].set_index(by[:3])["value"]
    keys = pd.MultiIndex.from_frame(rows[by[:3]])
    rows["ratio"] = rows["value"] / whole.reindex(keys).to_numpy()
    return rows.sort_values([*by[:3], "ratio"], kind="stable").reset_index(drop=True)


def formatted(rows: pd.DataFrame) -> pd.DataFrame:
    """The table for a reader."""
    return pd.DataFrame(
        {
            "method": rows["method"],
            "target": [f"{v:.2f}" for v in rows["sparsity_target"]],
            "without": rows["without"],
            "realised": [f"{v:.3f}" for v in rows["sparsity_realised"]],
            "FLOPs": [f"{v:.3f}" for v in rows["flops_ratio"]],
            "perplexity": [
                f"{v:.2f} [{a:.2f}, {b:.2f}]"
                for v, a, b in zip(rows["value"], rows["low"], rows["high"], strict=True)
            ],
            "x whole": ["" if pd.isna(v) else f"{v:.2f}" for v in rows["ratio"]],
            "x dense": [f"{v:.2f}" for v in rows["value"] / rows["dense"]],
            "training s": [f"{v:.0f}" for v in rows["training_s"]],
        }
    )


if __name__ == "__main__":
    run(main, __doc__)
