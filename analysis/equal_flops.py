"""Quality at equal FLOPs: the ratio of perplexities of each method at given shares of the dense.

python analysis/equal_flops.py results_dir=results [out_dir=results/plots] [flops=0.9,0.8,0.7,0.6]
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # run the code of this clone, whichever clone's environment it is
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from analysis.cli import parse, run_main, write
from analysis.drawing import tables
from analysis.frames import DENSE, RATIO, AnalysisError, Store
from analysis.view import View

SHARES = (0.9, 0.8, 0.7, 0.6)
"""Of the dense model's FLOPs."""
NEAR = 0.01
"""A point that is no further off stands for a share that lies beyond a method's points."""


def rows(store: Store) -> pd.DataFrame:
    """Take the perplexities of each method, averaged over seeds."""
    measured = store.averaged
    if measured.empty:
        return measured
    return measured[(measured["measure"] == "perplexity") & (measured["line"] != DENSE)]


def at_shares(part: pd.DataFrame, shares: Sequence[float]) -> Iterator[dict[str, Any]]:
    """Give the ratio to dense of each line, text and share, where the line has it.

    Between the two points of the line whose FLOPs enclose the share, linear in the logarithm; the
    ends of the interval too, which is then no narrower than that of a mixture of the two. Nothing
    is extrapolated: beyond its points a line has a value within `NEAR` of one, which is that
    point's.
    """
    for (line, shown), own in part.groupby(["line", "shown"]):
        ordered = own.sort_values("flops_ratio")
        flops = ordered["flops_ratio"].to_numpy(float)
        logs = np.log(ordered[list(RATIO)].to_numpy(float))
        for share in shares:
            inside = np.clip(share, flops[0], flops[-1])
            if abs(inside - share) > NEAR:
                continue
            found = [float(np.exp(np.interp(inside, flops, column))) for column in logs.T]
            above = min(int(np.searchsorted(flops, inside)), len(flops) - 1)
            below = above if flops[above] == inside else above - 1
            places = [below] if below == above else [below, above]
            yield {
                "method": str(line),
                "shown": str(shown),
                "flops": share,
                **dict(zip(RATIO, found, strict=True)),
                "flops_of_points": " ".join(f"{flops[place]:.4f}" for place in places),
                "fingerprints": " ".join(ordered["fingerprints"].iloc[places]),
            }


def table(part: pd.DataFrame, shares: Sequence[float]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tabulate one row per text and method, a column per share; least loss at the first ones."""
    columns = ["method", "shown", "flops", *RATIO, "flops_of_points", "fingerprints"]
    found = pd.DataFrame(list(at_shares(part, shares)), columns=columns)
    named = found.set_index(["shown", "method", "flops"])[list(RATIO)]
    listed: list[tuple[list[Any], list[str]]] = []
    for shown, line in part[["shown", "line"]].drop_duplicates().itertuples(index=False, name=None):
        places = [(shown, line, share) for share in shares]
        ratios = list(named.reindex(places).itertuples(index=False, name=None))
        cells = [tables.interval(ratio, ".3f") for ratio in ratios]
        worst_last = [shown, *(np.inf if np.isnan(value) else value for value, *_ in ratios)]
        listed.append((worst_last, [shown, line, *cells]))
    listed.sort(key=lambda row: row[0])
    names = ["/ dense", "method", *(f"at {share:g}" for share in shares)]
    return found, pd.DataFrame([row for _, row in listed], columns=names)


def view(shares: Sequence[float]) -> View:
    """Make the view of these shares."""
    return View(
        "equal_flops",
        "Quality at equal FLOPs",
        "Perplexity over dense, with its paired 95 % interval over documents, at a share of the "
        "dense model's FLOPs on the test text; routers, forecasts, the keys and values of bypassed "
        "tokens and the LM head count. Between the two nearest points of a method, linear in the "
        "logarithm; empty beyond its points.",
        "no point was evaluated: run runners/sweep.py",
        rows,
        partial(table, shares=shares),
        "Each method at the same FLOPs",
    )


VIEW = view(SHARES)


def main(arguments: Sequence[str]) -> None:
    """Write the table at the shares that are asked for."""
    usual = ",".join(f"{share:g}" for share in SHARES)
    paths, own = parse(arguments, flops=usual)
    try:
        shares = [float(word) for word in own["flops"].split(",")]
    except ValueError:
        said = f"flops={own['flops']}: shares of the dense FLOPs, as flops={usual}"
        raise AnalysisError(said) from None
    write(view(shares), paths)


if __name__ == "__main__":
    run_main(main, __doc__)
