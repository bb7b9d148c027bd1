"""95 % bootstrap bands of the curves, from the items of every point."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pandas as pd

from analysis import frames
from analysis.cli import AnalysisError
from analysis.significance import bootstrap

log = logging.getLogger(__name__)

BY = [*frames.SETTING, *frames.SERIES, "sparsity_target", "measure", "name"]


def bands(results_dir: Path) -> pd.DataFrame:
    """One row per series, target and task or text: `band_low` and `band_high`.

    Items (documents of a text) are drawn with replacement; the values of an item are averaged
    over seeds before. Points without an items.parquet have no band.
    """
    try:
        items = frames.items(results_dir)
    except AnalysisError as error:
        log.warning("no bands: %s", error)
        return pd.DataFrame(columns=[*BY, "band_low", "band_high"])
    rows = []
    for key, part in items.groupby(BY, dropna=False):
        own = part.groupby("item")[["value", "weight"]].mean()
        low, high = bootstrap(own["value"].to_numpy(), own["weight"].to_numpy())
        if part["measure"].iloc[0] == "perplexity":
            low, high = float(np.exp(low)), float(np.exp(high))
        names = key if isinstance(key, tuple) else (key,)
        rows.append(dict(zip(BY, names, strict=True)) | {"band_low": low, "band_high": high})
    return pd.DataFrame(rows)


def with_bands(averaged: pd.DataFrame, results_dir: Path) -> pd.DataFrame:
    """`frames.over_seeds` with a band beside each row; none where the items give none."""
    return averaged.merge(bands(results_dir), on=BY, how="left")
