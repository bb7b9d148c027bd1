"""The records of one setting: figures, how each differs, and the commands that give it again."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any, cast

import pandas as pd

from analysis.drawing import tables
from analysis.frames import Store
from analysis.groups import Flat, Record, show

Pairs = list[tuple[str, str]]


def records_of(store: Store, points: pd.DataFrame) -> dict[str, Any]:
    """List a setting's records for the page, and the configuration that all of them share."""
    by_name = {str(record["identity"]["fingerprint"]): record for record in store.records}
    ordered = points.sort_values(["line", "sparsity_target", "seed"], kind="stable")
    configs = [config for name in ordered["fingerprint"] if (config := store.configs[name])]
    shared = dict(configs[0]) if configs else {}
    for config in configs[1:]:
        shared = {k: v for k, v in shared.items() if k in config and config[k] == v}
    rows = store.measures
    measured = dict(iter(rows.groupby("fingerprint"))) if len(rows) else {}
    entries = []
    for point in cast("Any", ordered.itertuples()):
        record, config = by_name[point.fingerprint], store.configs[point.fingerprint]
        entries.append(
            {
                "fingerprint": point.fingerprint,
                "title": title(point),
                "figures": _figures(point, measured.get(point.fingerprint)),
                "commands": commands(record, config, store.results_dir),
                "differs": [(k, show(v)) for k, v in config.items() if k not in shared],
                "made_with": _made_with(record),
            }
        )
    return {"entries": entries, "shared": [(key, show(value)) for key, value in shared.items()]}


def title(point: Any) -> str:
    """Name a row of `Store.points`."""
    return f"{point.line}, target {point.sparsity_target:g}, seed {point.seed}"


def _figures(point: Any, measured: Any) -> list[str]:
    sparsity = tables.known(point.sparsity_realised)
    figures = [f"realised {sparsity}"] if sparsity else []
    figures.append(f"FLOPs {point.flops_ratio:.3f}")
    for row in measured.itertuples() if measured is not None else ():
        dense = f"{row.dense:.{2 if row.measure == 'perplexity' else 3}f}"
        sign = "x dense" if row.measure == "perplexity" else "to dense"
        against = f"{tables.against_dense(row)} {sign}"
        figures.append(f"{row.shown} {tables.figure(row)}, {against} ({dense}){_counted(row)}")
    return figures


def _counted(row: Any) -> str:
    """Say how sparse a task's own tokens were, and whether a context counts once for its choices.

    Only of its first figure; the test text's sparsity is the point's.
    """
    if row.measure != "accuracy" or pd.isna(row.realised_here):
        return ""
    how = "each context counted once" if row.shared_contexts else "contexts counted for each choice"
    return f", realised {row.realised_here:.3f} there, {how}"


def _made_with(record: Record) -> Pairs:
    """Code, weights, packages and hardware."""
    identity = record["identity"]
    git = identity.get("git") or {}
    commit = git.get("commit")
    dirty = " with uncommitted changes" if git.get("dirty") else ""
    packages = identity.get("packages") or {}
    facts = {
        "commit": f"{commit}{dirty}" if commit else None,
        "weights sha256": identity.get("weights_sha256"),
        "dtype": identity.get("dtype"),
        "objective": identity.get("objective"),
        "device": identity.get("device"),
        "python": identity.get("python"),
        "packages": ", ".join(f"{name} {version}" for name, version in packages.items()),
        "seconds": f"{record['seconds']:.0f}" if record.get("seconds") else None,
    }
    return [(key, str(value)) for key, value in facts.items() if value]


def commands(record: Record, config: Flat, results_dir: Path) -> Pairs:
    """List (what it is, command) of each way to get a record's numbers again, exact one first.

    The first runs from the stored, fully resolved configuration, so that it does not depend on
    today's defaults; it writes to `reproduced/` and the record there has the same fingerprint.
    """
    folder = results_dir / str(record["identity"]["fingerprint"])
    stored = ["--config-dir", str(folder), "--config-name", "config", "results_dir=reproduced"]
    listed = []
    if config and record.get("evaluated", True):
        script, more = "sweep", []
        if config.get("saved"):
            script = "score"
            more = [f"saved={config['saved']}"]
            more += [] if config.get("recalibrate") else ["sparsity=null"]
        listed.append(("exactly this point", _line(script, [*stored, *more])))
    if config and record.get("speed"):
        listed.append(("its speed", _line("speed", stored)))
    started = record["identity"].get("command")
    if started:
        listed.append(("as it was started", str(started)))
    if (folder / "routing" / "decisions.parquet").is_file():
        listed.append(("its routing maps", _line("inspect_routing", [f"saved={folder}/routed"])))
    return listed


def _line(script: str, words: list[str]) -> str:
    return shlex.join(["python", f"runners/{script}.py", *words])
