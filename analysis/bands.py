"""95 % bootstrap bands of the curves, from the items of every point."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis import frames
from analysis.cli import AnalysisError
from analysis.significance import intervals

log = logging.getLogger(__name__)

BY = [*frames.SETTING, *frames.SERIES, "sparsity_target", "measure", "name"]


def bands(results_dir: Path, records: Sequence[frames.Record] | None = None) -> pd.DataFrame:
    """One row per series, target and task or text: `band_low` and `band_high`.

    Items (documents of a text) are drawn with replacement; the values of an item are averaged
    over seeds before. Points without an items.parquet have no band.

    Args:
        records: those of the store, where they are read already.
    """
    try:
        items = frames.items(results_dir, records)
    except AnalysisError as error:
        log.warning("no bands: %s", error)
        return pd.DataFrame(columns=[*BY, "band_low", "band_high"])
    return of_items(items)


def of_items(items: pd.DataFrame) -> pd.DataFrame:
    """The same, of the rows of `frames.items`."""
    parts = []
    for (measure, _), part in items.groupby(["measure", "name"]):
        means = part.groupby([*BY, "item"], dropna=False)[["value", "weight"]].mean()
        wide: Any = means.unstack("item")
        ends = pd.DataFrame(index=wide.index, columns=["band_low", "band_high"], dtype=float)
        for rows, sums, weights in _together(wide["value"], wide["weight"]):
            low, high, _ = intervals(sums, weights)
            both = np.column_stack([low, high])
            ends.iloc[rows] = np.exp(both) if measure == "perplexity" else both
        parts.append(ends)
    return pd.concat(parts).reset_index()


def _together(
    values: pd.DataFrame, weights: pd.DataFrame
) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Rows with the same items and weights: (their places, sums [items, rows], weights)."""
    groups: dict[bytes, list[int]] = {}
    sums_RN, weights_RN = values.to_numpy(), weights.to_numpy()
    for place, row in enumerate(weights_RN):
        groups.setdefault(row.tobytes(), []).append(place)
    for places in groups.values():
        answered = ~np.isnan(weights_RN[places[0]])
        yield places, sums_RN[places][:, answered].T, weights_RN[places[0]][answered]


def with_bands(
    averaged: pd.DataFrame, results_dir: Path, records: Sequence[frames.Record] | None = None
) -> pd.DataFrame:
    """`frames.over_seeds` with a band beside each row; none where the items give none."""
    return averaged.merge(bands(results_dir, records), on=BY, how="left")
