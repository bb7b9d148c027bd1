"""The configurations of a store: what its points share, where each differs, how to run it again."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from analysis.frames import Record

Flat = Mapping[str, Any]
BLOCK = re.compile(r"^(?=[^\s#-])", re.MULTILINE)
"""A top-level key of a block-style YAML file begins here."""
NOT_COMPARED = ("results_dir", "cache_dir", "tracking.", "force")
"""Where and how loudly, never what is computed."""


def read_config(folder: Path) -> Flat:
    """The resolved configuration of a point as `{"budget.routers.steps": 40}`; {} without one."""
    try:
        text = (folder / "config.yaml").read_text(encoding="utf-8")
    except OSError:
        return {}
    flat: dict[str, Any] = {}
    for block in BLOCK.split(text):
        flat.update(_block(block))
    return flat


@lru_cache(maxsize=4096)
def _block(text: str) -> Flat:
    """One top-level key; thousands of points share most of theirs, and YAML is slow to read."""
    try:
        return flatten(yaml.safe_load(text) or {})
    except (yaml.YAMLError, AttributeError):
        return {}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys; lists are values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def common(configs: Iterable[Flat]) -> dict[str, Any]:
    """Keys whose value is the same in all configurations."""
    listed = [config for config in configs if config]
    if not listed:
        return {}
    shared = {k: v for k, v in listed[0].items() if not k.startswith(NOT_COMPARED)}
    for config in listed[1:]:
        shared = {k: v for k, v in shared.items() if k in config and config[k] == v}
    return shared


def differing(config: Flat, shared: Mapping[str, Any]) -> dict[str, Any]:
    """What is particular to one configuration."""
    return {
        key: value
        for key, value in config.items()
        if key not in shared and not key.startswith(NOT_COMPARED)
    }


def commands(record: Record, config: Flat, results_dir: Path) -> list[tuple[str, str]]:
    """(what it is, command) of each way to get a record's numbers again, exact one first.

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
