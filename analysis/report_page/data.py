"""Everything that a report reads, once, and cut to one setting (model, data, budget)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pandas as pd

from analysis import bands, frames
from analysis.cli import AnalysisError
from analysis.significance import compare


@dataclass(frozen=True)
class Data:
    """Rows of `analysis.frames`, of all settings or of one."""

    points: pd.DataFrame
    measured: pd.DataFrame
    averaged: pd.DataFrame
    """Over seeds, with bands."""
    stages: pd.DataFrame
    layers: pd.DataFrame
    speed: pd.DataFrame
    items: pd.DataFrame
    compared: pd.DataFrame
    """Paired tests (`analysis.significance.compare`), of one setting only."""


Setting = tuple[str, str, Data]
"""Slug, title and rows."""


def load(records: Sequence[frames.Record], results_dir: Path) -> Data:
    """The frames of a store's records; items are read where they were saved."""
    measured = frames.measures(records)
    try:
        items = frames.items(results_dir, records)
    except AnalysisError:
        items = pd.DataFrame()
    averaged = frames.over_seeds(measured) if len(measured) else measured
    if len(averaged) and len(items):
        averaged = averaged.merge(bands.of_items(items), on=bands.BY, how="left")
    return Data(
        frames.points(records),
        measured,
        averaged,
        frames.stages(records),
        frames.layers(records),
        frames.speed(records),
        items,
        pd.DataFrame(),
    )


def by_setting(data: Data) -> Iterator[Setting]:
    """Each setting that has points."""
    for slug, title, points in frames.by_setting(data.points):
        setting = points[frames.SETTING].iloc[0]
        own = Data(*(_of(getattr(data, field.name), setting) for field in fields(Data)))
        compared = compare(own.items) if len(own.items) else own.items
        yield slug, title, replace(own, compared=compared)


def _of(frame: pd.DataFrame, setting: pd.Series) -> pd.DataFrame:
    if frame.empty:
        return frame
    same = pd.Series(True, index=frame.index)
    for key in frames.SETTING:
        same &= frame[key] == setting[key]
    return frame[same]
