"""Perplexity against kept KV bytes: one line per method and KV policy.

python analysis/kv.py results_dir=results [out_dir=results/plots]
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # run the code of this clone, whichever clone's environment it is
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import pandas as pd

from analysis.cli import run
from analysis.drawing import style, tables
from analysis.frames import DENSE, Store
from analysis.tradeoff import draw, measure_panels
from analysis.view import Panel, View


def rows(store: Store) -> pd.DataFrame:
    """Take the routed perplexities of settings in which some method drops keys and values."""
    if store.averaged.empty:
        return store.averaged
    measured = store.averaged[store.averaged["method"] != DENSE]
    measured = measured[measured["measure"] == "perplexity"]
    policies = store.points[["setting", "line", "kv_policy"]].drop_duplicates(["setting", "line"])
    least = measured.groupby("setting")["kv_bytes_ratio"].transform("min")
    return measured[least < 1.0].merge(policies, on=["setting", "line"])


def panels(part: pd.DataFrame) -> list[Panel]:
    """Draw log perplexity over KV bytes, a panel a text; less memory to the right."""
    cost = {"kv_bytes_ratio": "KV bytes (routed / dense)"}
    return measure_panels(part, cost, draw, "{measure} over {cost}")


def table(part: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tabulate one row per line, text and target."""
    columns = {
        "method": ("line", ""),
        "KV policy": ("kv_policy", ""),
        "target": ("sparsity_target", ".2f"),
        "KV bytes": ("kv_bytes_ratio", ".3f"),
        "on": ("name", ""),
        "perplexity": ("value", ".2f"),
        "x dense": ("against", ""),
    }
    against = [tables.against_dense(row) for row in part.itertuples()]
    return part, tables.formatted(part.assign(against=against), columns)


VIEW = View(
    "kv",
    "KV cache",
    "",
    "every method keeps all keys and values: run runners/sweep.py experiment=kv -m",
    rows,
    table,
    "KV bytes of each method and policy",
    panels,
    more={DENSE: style.DASHED},
    height_in=2.2,
)

if __name__ == "__main__":
    run(VIEW, __doc__)
