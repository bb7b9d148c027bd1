"""Figures of each item and document, as one small Parquet file beside a result record."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from runners.store.files import write_bytes_atomic

COLUMNS = ("measure", "name", "metric", "item", "value", "weight", "dense")


def write_items(
    path: Path, items: Mapping[str, Mapping[str, Any]], dense: Mapping[str, Mapping[str, Any]]
) -> None:
    """One row per item: what two methods are compared on, item by item.

    Columns: `measure` (accuracy | perplexity | margin), `name` of the task or text, `metric`,
    `item` (the same for the same item in every point), `value` (right or wrong; nll in nats of a
    document; the right choice's margin in nats), `weight` (tokens or words of a document, else 1),
    `dense` (the value of the dense model).

    Args:
        items: `scores.Items` as a dictionary, by task or text.
        dense: the dense model's, in the same order.
    """
    frames = []
    for name, own in items.items():
        frames.append(_frame(own["measure"], name, own["metric"], own, dense[name], "values"))
        if own["margins"]:
            kind, column = "margin", "margins"
            frames.append(_frame(kind, name, kind, own, dense[name], column))
    table = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=list(COLUMNS))
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False, compression="zstd")
    write_bytes_atomic(path, buffer.getvalue())


def _frame(
    measure: str,
    name: str,
    metric: str,
    own: Mapping[str, Any],
    dense: Mapping[str, Any],
    column: str,
) -> pd.DataFrame:
    named = {"measure": measure, "name": name, "metric": metric}
    figures = {"item": own["keys"], "value": own[column], "weight": own["weights"]}
    frame = pd.DataFrame(named | figures)
    beside = dict(zip(dense["keys"], dense[column], strict=True))
    frame["dense"] = frame["item"].map(beside).astype(float)
    return frame
