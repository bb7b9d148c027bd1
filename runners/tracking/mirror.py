"""A finished record as tables, pictures and files of a tracker."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import TYPE_CHECKING, Any

from runners.store.run_folder import sizes
from runners.tracking.base import Files, Rows, Safe, Tracker

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = ("attention", "mlp")
CONFIGURED = frozenset(
    "method variant model data seed sparsity_target options kv_policy identity lora "
    "schema_version speed".split()
)
"""Fields of a record that the run's configuration has, or that say how it came about."""
CASE = ("speedup", "bound", "efficiency", "dense_tps", "routed_tps", "sparsity")
"""Figures of a timed case that become scalars."""


def mirror(tracker: Safe, folder: Path, result: Mapping[str, Any]) -> None:
    """Send a record and what it describes; the first failure ends it, the record is on disk.

    Args:
        folder: of the point, complete.
        result: the record.
    """
    tracker.summary(summary_of(result))
    per_layer = result["realised"]["per_layer"]
    tracker.attempt(_table("results", result_rows(result)))
    tracker.attempt(_table("stages", stage_rows(result)))
    if per_layer:
        tracker.attempt(_table("sparsity_by_layer", layer_rows(per_layer)))
        tracker.attempt(lambda t: t.picture("routing", routing_map(per_layer)))
    tracker.attempt(lambda t: send_files(t, folder, result))


def summary_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """What a point found; runs are told apart and filtered by their configuration.

    `perplexity_ratio` is routed over dense, the geometric mean over texts.
    """
    found = {key: value for key, value in result.items() if key not in CONFIGURED}
    texts = [t for t in result["perplexity"].values() if t.get("metric") in (None, "perplexity")]
    if texts:
        found["perplexity_ratio"] = geometric_mean([t["value"] / t["dense"] for t in texts])
    return found


def speed_summary(speed: Mapping[str, Any]) -> dict[str, Any]:
    """Figures of every timed case, and `speedup_prefill` and `speedup_decode` of the last ones."""
    found: dict[str, Any] = {}
    for phase in ("prefill", "decode"):
        for case in speed.get(phase) or []:
            figures = {key: case[key] for key in CASE if key in case}
            found |= {f"speedup_{phase}": case["speedup"], f"speed/{phase}_{sizes(case)}": figures}
    return found


def mirror_speed(tracker: Safe, speed: Mapping[str, Any]) -> None:
    """Send what was timed: scalars, and a row a case."""
    tracker.summary(speed_summary(speed))
    for phase in ("prefill", "decode"):
        rows = [
            {key: value for key, value in case.items() if not isinstance(value, (Mapping, list))}
            for case in speed.get(phase) or []
        ]
        if rows:
            tracker.attempt(_table(f"speed_{phase}", rows))


def _table(name: str, rows: Rows) -> Callable[[Tracker], None]:
    return lambda tracker: tracker.table(name, rows)


def result_rows(result: Mapping[str, Any]) -> Rows:
    """One row per text and task, the dense model's value beside each."""
    rows: list[dict[str, Any]] = []
    for name, entry in result["perplexity"].items():
        own = {"value": entry["value"], "low": entry["low"], "high": entry["high"]}
        named = {"measure": "perplexity", "name": name, "metric": entry.get("metric", "perplexity")}
        rows.append({**named, **own, "dense": entry["dense"]})
    for name, entry in result["accuracy"].items():
        stderr = entry["stderr"] or 0.0
        own = {"value": entry["value"], "low": entry["value"] - stderr}
        own["high"] = entry["value"] + stderr
        named = {"measure": "accuracy", "name": name, "metric": entry["metric"]}
        rows.append({**named, **own, "dense": entry["dense"]})
    if "generation" in result:
        entry = result["generation"]["kept"]
        stderr = entry["stderr"] or 0.0
        own = {"low": entry["value"] - stderr, "high": entry["value"] + stderr}
        named = {"measure": "generation", "name": "kept", "metric": "kept"}
        rows.append({**named, "value": entry["value"], **own, "dense": entry["dense"]})
    return rows


def stage_rows(result: Mapping[str, Any]) -> Rows:
    """One row per stage: what it cost."""
    columns = ("name", "seconds", "steps", "tokens", "peak_memory_bytes", "final_loss", "cached")
    return [{column: stage[column] for column in columns} for stage in result["stages"]]


def layer_rows(per_layer: Sequence[Mapping[str, Any]]) -> Rows:
    """One row per layer: realised sparsity of each unit kind."""
    return [{"layer": entry["layer"], **{k: entry[k] for k in KINDS}} for entry in per_layer]


def routing_map(per_layer: Sequence[Mapping[str, Any]]) -> Figure:
    """Shade: share of tokens that each layer's units execute."""
    from matplotlib.figure import Figure

    shares = [[1.0 - entry[kind] for entry in per_layer] for kind in KINDS]
    figure = Figure(figsize=(8, 2), layout="constrained")
    panel = figure.add_subplot()
    shown = panel.imshow(shares, aspect="auto", vmin=0, vmax=1, cmap="cividis")
    panel.set_yticks(range(len(KINDS)), KINDS)
    panel.set_xlabel("layer")
    figure.colorbar(shown, ax=panel, label="executed")
    return figure


def send_files(tracker: Tracker, folder: Path, result: Mapping[str, Any]) -> None:
    """The saved routed model and the record, made from the base model and the text."""
    identity = result["identity"]
    point = f"{result['method']}-{identity['fingerprint']}"
    facts = {key: result[key] for key in ("method", "seed", "sparsity_target", "sparsity_realised")}
    inputs = (
        ("base_model", str(result["model"]), {"weights_sha256": identity.get("weights_sha256")}),
        ("dataset", str(result["data"]), {"documents": _documents(result)}),
    )
    saved = folder / "routed"
    if saved.is_dir():
        tracker.files(Files("routed_model", f"routed-{point}", [saved], facts, inputs))
    names = ("result.json", "config.yaml", "log.jsonl")
    record = [path for name in names if (path := folder / name).is_file()]
    tracker.files(Files("record", f"record-{point}", record, facts, inputs))


def _documents(result: Mapping[str, Any]) -> dict[str, Any]:
    return {name: entry.get("documents") for name, entry in result["perplexity"].items()}
