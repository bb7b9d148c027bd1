"""Reads offline W&B runs: a LevelDB log of protocol buffers, after a header of 7 bytes."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK_BYTES, HEADER_BYTES = 32768, 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4
PATIENCE = 10.0
"""Seconds for a run that was killed, which never gets its exit code."""


def records(file: Path) -> Iterator[bytes]:
    """Payloads in order; a record that spans blocks is joined.

    One that the file's end cuts off is still being written, and left out as LevelDB's readers do.
    """
    content, place, parts = file.read_bytes(), HEADER_BYTES, b""
    assert content[:4] == b":W&B"
    while place + HEADER_BYTES <= len(content):
        if BLOCK_BYTES - place % BLOCK_BYTES < HEADER_BYTES:
            place += BLOCK_BYTES - place % BLOCK_BYTES
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + HEADER_BYTES])
        place += HEADER_BYTES
        if place + length > len(content):
            return
        data = content[place : place + length]
        place += length
        parts = data if kind in (FULL, FIRST) else parts + data
        if kind in (FULL, LAST):
            yield parts


def read_run(file: Path) -> dict[str, Any]:
    """What `wandb sync` would send: run, configuration, history, summary, exit code."""
    from wandb.proto import wandb_internal_pb2 as proto

    found: dict[str, Any] = {"config": {}, "history": [], "summary": {}, "exit": None}
    found["artifacts"] = {}
    for data in records(file):
        record = proto.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
            found |= {"group": run.run_group, "name": run.display_name, "job": run.job_type}
            found |= {"id": run.run_id, "tags": list(run.tags)}
            found["config"] |= {u.key: json.loads(u.value_json) for u in run.config.update}
        elif kind == "history":
            found["history"].append(_items(record.history.item))
        elif kind == "summary":
            found["summary"] |= _items(record.summary.update)
        elif kind == "artifact":
            artifact = record.artifact
            facts = json.loads(artifact.metadata or "{}")
            own = {"kind": artifact.type, "input": artifact.use_after_commit, "metadata": facts}
            own["files"] = sorted(entry.path for entry in artifact.manifest.contents)
            found["artifacts"][artifact.name] = own
        elif kind == "exit":
            found["exit"] = record.exit.exit_code
    return found


def _items(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def runs(folder: str | Path) -> list[dict[str, Any]]:
    """Every offline run under a tracking folder, the one that ended first before the others.

    Their names tell the second only, in which two may start. W&B's service writes a file to its end
    a moment after the run has finished: its exit code is waited for.
    """
    files = list(Path(folder).glob("wandb/offline-run-*/*.wandb"))
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and any(read_run(file)["exit"] is None for file in files):
        time.sleep(0.05)
    return [read_run(file) for file in sorted(files, key=lambda file: file.stat().st_mtime_ns)]
