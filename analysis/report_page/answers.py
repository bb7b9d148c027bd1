"""The answer of a setting in a few lines, above everything else, and what it was measured on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pandas as pd

from analysis import equal_flops, verdict
from analysis.drawing import tables
from analysis.frames import RATIO
from analysis.groups import Record

CONTROL = "all tokens alike"
Pairs = list[tuple[str, str]]


def answers(timed: pd.DataFrame, measured: pd.DataFrame) -> tuple[Pairs, str]:
    """Say who loses least at each measured speed-up, or at equal FLOPs where nothing was timed.

    Args:
        timed, measured: rows of one setting of the views of `verdict` and `equal_flops`.

    Returns:
        (at what, who) of its first text, and the name of the view that has the whole table.
    """
    if len(timed):
        return _at_speeds(timed), "verdict"
    return _at_flops(measured), "equal_flops"


def _at_speeds(timed: pd.DataFrame) -> Pairs:
    found = verdict.standings(timed)
    found = found.dropna(subset=["method"]) if "method" in found else found.iloc[:0]
    if found.empty:
        return []
    found = found[found["name"] == found["name"].min()]
    listed = dict(iter(found.sort_values("ratio").groupby(["phase", "at_least"])))
    order = sorted(listed, key=lambda key: (verdict.PHASES.index(key[0]), key[1]))
    said = "At {1:g} times dense's speed in {0}:"
    return [(said.format(*key), " ".join(_sentences(listed[key]))) for key in order]


def _at_flops(measured: pd.DataFrame) -> Pairs:
    if measured.empty:
        return []
    roles = measured.drop_duplicates("line").set_index("line")["role"]
    found = pd.DataFrame(list(equal_flops.at_shares(measured, equal_flops.SHARES)))
    if found.empty:
        return []
    found = found[found["shown"] == found["shown"].min()]
    found = found.assign(role=found["method"].map(roles))
    found = found[~found["role"].isin(verdict.NO_CONTENDER)]
    listed = dict(iter(found.sort_values("ratio").groupby("flops")))
    return [
        (f"At {share:g} of dense's FLOPs:", " ".join(_sentences(listed[share])))
        for share in sorted(listed, reverse=True)
    ]


def _sentences(own: pd.DataFrame) -> Iterator[str]:
    """The first of all, and the first of the other kind: routed by token, or a control."""
    best = own.iloc[0]
    yield f"{_shown(best)} loses least."
    control = best["role"] == CONTROL
    others = own[(own["role"] == CONTROL) != control]
    kind = "those that route each token" if control else "the controls"
    if len(others):
        yield f"Of {kind}: {_shown(others.iloc[0])}."


def _shown(row: Any) -> str:
    return f"{row['method']} {tables.interval(tuple(row[name] for name in RATIO), '.3f')}"


def measured_on(records: Iterable[Record]) -> Pairs:
    """Name the hardware, precision, text and items behind the figures of some records."""
    found: dict[str, dict[str, None]] = {}

    def add(key: str, value: Any) -> None:
        if value:
            found.setdefault(key, {})[str(value)] = None

    for record in records:
        identity = record["identity"]
        add("device", identity.get("device"))
        add("precision", identity.get("dtype"))
        add("threads", identity.get("torch_threads"))
        for name, entry in record["perplexity"].items():
            sizes = [f"{entry[key]:,} {key}" for key in ("documents", "tokens") if entry.get(key)]
            add("text", f"{name} ({', '.join(sizes)})" if sizes else name)
        for name, entry in record["accuracy"].items():
            add("items", f"{name} ({entry['n']:,})")
        if "generation" in record:
            add("prompts continued", record["generation"]["kept"]["n"])
    return [(key, ", ".join(values)) for key, values in found.items()]
