"""The records of one setting: figures, how each differs, and the commands that give it again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis import frames
from analysis.frames import Record
from analysis.report_page import configs


@dataclass(frozen=True)
class Entry:
    """One record."""

    fingerprint: str
    title: str
    figures: list[str]
    commands: list[tuple[str, str]]
    differs: list[tuple[str, str]]
    made_with: list[tuple[str, str]]


@dataclass(frozen=True)
class Records:
    """All records of a setting."""

    entries: list[Entry]
    shared: list[tuple[str, str]]
    """Configuration that all of them have in common."""


def records_of(records: Sequence[Record], results_dir: Path) -> Records:
    """Entries in the order of method, target and seed."""
    ordered = sorted(records, key=lambda r: (_label(r), r["sparsity_target"], r["seed"]))
    read = [configs.read_config(results_dir / _fingerprint(record)) for record in ordered]
    shared = configs.common(read)
    entries = [
        _entry(record, config, shared, results_dir)
        for record, config in zip(ordered, read, strict=True)
    ]
    return Records(entries, [(key, _show(value)) for key, value in shared.items()])


def _entry(
    record: Record, config: configs.Flat, shared: dict[str, Any], results_dir: Path
) -> Entry:
    differs = configs.differing(config, shared)
    return Entry(
        fingerprint=_fingerprint(record),
        title=f"{_label(record)}, target {record['sparsity_target']:g}, seed {record['seed']}",
        figures=_figures(record),
        commands=configs.commands(record, config, results_dir),
        differs=[(key, _show(value)) for key, value in differs.items()],
        made_with=_made_with(record),
    )


def _figures(record: Record) -> list[str]:
    figures = [
        f"realised {record['sparsity_realised']:.3f}",
        f"FLOPs {record['flops_ratio']:.3f}",
    ]
    for name, entry in record["perplexity"].items():
        interval = f"[{entry['low']:.2f}, {entry['high']:.2f}]"
        figures.append(
            f"{name} perplexity {entry['value']:.2f} {interval} (dense {entry['dense']:.2f})"
        )
    for name, entry in record["accuracy"].items():
        spread = f" ± {entry['stderr']:.3f}" if entry["stderr"] else ""
        figures.append(f"{name} {entry['value']:.3f}{spread} (dense {entry['dense']:.3f})")
    return figures


def _made_with(record: Record) -> list[tuple[str, str]]:
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


def _label(record: Record) -> str:
    return frames.label(str(record["method"]), str(record.get("variant") or ""))


def _fingerprint(record: Record) -> str:
    return str(record["identity"]["fingerprint"])


def _show(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    return str(value)
