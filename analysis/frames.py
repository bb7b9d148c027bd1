"""The results store as tidy data frames; the only place that knows the record's layout."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import pyarrow
from pyarrow import parquet

from analysis.cli import AnalysisError

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
SETTING = ["model", "data", "budget"]
"""Points that differ in one of these never share a picture."""
SERIES = ["method", "variant"]
"""What makes a line in a picture."""
VALUES = ["value", "low", "high"]
"""A measure and its interval."""
UPPER_BOUND = " (upper bound)"
"""Suffix of an oracle's name, in every table and picture."""
Record = Mapping[str, Any]


def read_store(results_dir: Path) -> list[Record]:
    """Complete records under `<results_dir>/<fingerprint>/`; others are named in the log.

    Raises:
        AnalysisError: none is complete, or all are of another schema.
    """
    return read_all(results_dir)[0]


def read_all(results_dir: Path) -> tuple[list[Record], list[tuple[Path, str]]]:
    """`read_store`, and (file, reason) of each record that is not complete."""
    records, left_out = _scan(results_dir)
    reasons = [f"{path}: {reason}" for path, reason in left_out]
    for reason in reasons:
        log.warning("left out %s", reason)
    if not records:
        why = f" ({reasons[0]})" if reasons else ""
        raise AnalysisError(f"no complete result in {results_dir}{why}")
    return records, left_out


def _scan(results_dir: Path) -> tuple[list[Record], list[tuple[Path, str]]]:
    records: list[Record] = []
    left_out = []
    for path in sorted(results_dir.glob("*/result.json")):
        try:
            record = json.loads(path.read_bytes())
            version, status = record["schema_version"], record["status"]
        except (ValueError, KeyError, TypeError):
            left_out.append((path, "not a result record"))
            continue
        if version != SCHEMA_VERSION:
            left_out.append((path, f"schema {version}, this code reads {SCHEMA_VERSION}"))
        elif status != "complete":
            left_out.append((path, f"{status}: {record.get('reason', 'no reason given')}"))
        else:
            records.append(record)
    return records, left_out


def points(records: Sequence[Record]) -> pd.DataFrame:
    """One row per point: what it is, realised sparsity, cost, added parameters, threshold."""
    return pd.DataFrame([_key(record) for record in records])


def measures(records: Sequence[Record]) -> pd.DataFrame:
    """One row per point and measure.

    Columns beside the point's: `measure` (perplexity | accuracy), `name`, `value`, `low`, `high`
    (the 95 % bootstrap interval of a perplexity, one standard error of an accuracy), `dense`,
    `chance` (accuracies), `n` (items or documents).
    """
    rows = []
    for record in records:
        key = _key(record)
        rows += [key | row for row in _measures(record)]
    return pd.DataFrame(rows)


def _measures(record: Record) -> Iterator[dict[str, Any]]:
    for name, entry in record["perplexity"].items():
        yield {
            "measure": "perplexity",
            "name": name,
            **{k: entry[k] for k in ("value", "low", "high", "dense")},
            "chance": None,
            "n": entry.get("documents"),
        }
    for name, entry in record["accuracy"].items():
        value, stderr = entry["value"], entry["stderr"] or 0.0
        yield {
            "measure": "accuracy",
            "name": name,
            "value": value,
            "low": value - stderr,
            "high": value + stderr,
            "dense": entry["dense"],
            "chance": entry.get("chance"),
            "n": entry["n"],
        }


def items(results_dir: Path, records: Sequence[Record] | None = None) -> pd.DataFrame:
    """One row per point and item of its tasks and texts, from `items.parquet` beside each record.

    Columns beside the point's: `line` (its label), `measure`, `name`, `metric`, `item` (equal for
    the same item in all points), `value` (right or wrong; nll in nats), `weight`, `dense`.

    Args:
        records: those of the store, where they are read already.

    Raises:
        AnalysisError: no complete point has such a file.
    """
    tables, keys, counts = [], [], []
    for record in read_store(results_dir) if records is None else records:
        key = _key(record)
        path = results_dir / key["fingerprint"] / "items.parquet"
        if path.is_file():
            tables.append(parquet.ParquetFile(path).read(use_threads=False))
            keys.append(key | {"line": label(key["method"], key["variant"])})
            counts.append(len(tables[-1]))
    if not tables:
        raise AnalysisError(
            f"no point of {results_dir} has an items.parquet; run it with force=true"
        )
    own = pyarrow.concat_tables(tables, promote_options="permissive").to_pandas()
    frame = pd.DataFrame(keys)
    repeated = frame.loc[frame.index.repeat(counts)].reset_index(drop=True)
    return pd.concat([own, repeated], axis="columns")


def stages(records: Sequence[Record]) -> pd.DataFrame:
    """One row per point and stage: seconds, tokens, steps, peak bytes, figures, `cached`."""
    rows = []
    for record in records:
        for order, stage in enumerate(record["stages"]):
            figures = stage.get("figures") or {}
            plain = {k: v for k, v in stage.items() if k != "figures"}
            plain["stage"] = plain.pop("name")
            rows.append(_key(record) | {"order": order} | plain | figures)
    return pd.DataFrame(rows)


def speed(records: Sequence[Record]) -> pd.DataFrame:
    """One row per point and timed case.

    Columns beside the point's: `phase` (prefill | decode), `tokens` (of the prompt, or in the
    cache), `batch`, `dense_tps`, `routed_tps`, `speedup` with `speedup_p20` and `speedup_p80`,
    `bound`, `efficiency`, `sparsity` (realised on what was timed), `device`.
    """
    kept = "batch dense_tps routed_tps speedup speedup_p20 speedup_p80 bound efficiency sparsity"
    rows = []
    for record in records:
        measured = record.get("speed") or {}
        for phase, length in (("prefill", "seq"), ("decode", "context")):
            for case in measured.get(phase, []):
                row = {"phase": phase, "tokens": case[length], **{k: case[k] for k in kept.split()}}
                rows.append(_key(record) | row | {"device": measured["settings"]["device"]})
    return pd.DataFrame(rows)


def layers(records: Sequence[Record]) -> pd.DataFrame:
    """One row per point, layer and unit kind: realised sparsity there (`sparsity`).

    Built by column: a store of thousands of points has hundreds of thousands of such rows.
    """
    per_layer = [(record.get("realised") or {}).get("per_layer") or [] for record in records]
    kinds = ("attention", "mlp")
    own = pd.DataFrame(
        {
            "layer": [entry["layer"] for entries in per_layer for entry in entries for _ in kinds],
            "kind": [kind for entries in per_layer for _ in entries for kind in kinds],
            "sparsity": [entry[k] for entries in per_layer for entry in entries for k in kinds],
        }
    )
    counts = [len(kinds) * len(entries) for entries in per_layer]
    keys = points(records)
    repeated = keys.loc[keys.index.repeat(counts)].reset_index(drop=True)
    return pd.concat([repeated, own], axis="columns") if len(own) else pd.DataFrame()


def options(records: Sequence[Record]) -> pd.DataFrame:
    """One row per point: its fingerprint and its method's own options, a column each."""
    return pd.DataFrame([_key(record) | (record.get("options") or {}) for record in records])


def over_seeds(frame: pd.DataFrame) -> pd.DataFrame:
    """Measures averaged over seeds; with several seeds `low` and `high` are mean -/+ std.

    Of perplexities the losses are averaged: `low` and `high` lie by one factor below and above.
    """
    by = [*SETTING, *SERIES, "sparsity_target", "measure", "name"]
    groups = losses(frame).groupby(by, dropna=False, sort=True)
    merged = groups[["sparsity_realised", "flops_ratio", *VALUES, "dense", "chance"]].mean()
    merged["seeds"] = groups["seed"].nunique()
    spread = groups["value"].std()
    several = merged["seeds"] > 1
    merged.loc[several, "low"] = (merged["value"] - spread)[several]
    merged.loc[several, "high"] = (merged["value"] + spread)[several]
    return perplexities(merged.reset_index())


def seed_means(frame: pd.DataFrame, by: Sequence[str], columns: Sequence[str]) -> pd.DataFrame:
    """Means of columns over the seeds of each group; of perplexities the losses are averaged.

    Returns:
        `by`, `measure` and `columns`.
    """
    means = losses(frame).groupby([*by, "measure"])[list(columns)].mean()
    return perplexities(means.reset_index())


def losses(frame: pd.DataFrame) -> pd.DataFrame:
    """Measures with perplexities as nats per token, which is what may be averaged over seeds.

    A mean of perplexities is that of the worst seed where seeds are orders apart.
    """
    return _mapped(frame, np.log)


def perplexities(frame: pd.DataFrame) -> pd.DataFrame:
    """What `losses` made nats, as perplexities again."""
    return _mapped(frame, np.exp)


def _mapped(frame: pd.DataFrame, to: Callable[[Any], Any]) -> pd.DataFrame:
    changed = frame.copy()
    rows = frame["measure"] == "perplexity"
    columns = [name for name in VALUES if name in frame]
    changed.loc[rows, columns] = to(frame.loc[rows, columns].astype(float))
    return changed


def by_setting(frame: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """(slug for a file name, title, rows) of each setting whose points share a picture."""
    for setting, part in frame.groupby(SETTING):
        words = cast("tuple[Any, ...]", setting)
        yield slug(words), " · ".join(str(word) for word in words), part


def with_lines(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows with a column `line`, the label of what they belong to in a picture."""
    lines = [label(m, v) for m, v in zip(frame.method, frame.variant, strict=True)]
    return frame.assign(line=lines)


def label(method: str, variant: str) -> str:
    """Name of a line or a row."""
    return f"{method} ({variant})" if variant else method


def slug(setting: Sequence[Any]) -> str:
    """File-name form of a setting, e.g. `smollm2_135m-sotu-quick`."""
    words = "-".join(str(part) for part in setting)
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in words)


def _key(record: Record) -> dict[str, Any]:
    identity = record["identity"]
    return {
        "model": record["model"],
        "data": record["data"],
        "budget": identity["budget"],
        "method": record["method"] + (UPPER_BOUND if identity.get("upper_bound") else ""),
        "variant": record.get("variant") or "",
        "seed": record["seed"],
        "sparsity_target": record["sparsity_target"],
        "sparsity_realised": record["sparsity_realised"],
        "flops_ratio": record["flops_ratio"],
        "kv_bytes_ratio": record.get("kv_bytes_ratio", 1.0),
        "kv_policy": record.get("kv_policy", "keep"),
        "added_parameters": record.get("added_parameters"),
        "fingerprint": identity["fingerprint"],
    }
