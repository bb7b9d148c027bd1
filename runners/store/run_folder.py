"""Where results live: one folder per point, named by what determines its numbers.

`results/<fingerprint>/{config.yaml, status.json, result.json, items.parquet, log.jsonl, routed/}`.
`config.yaml` is written first and `result.json` last, both atomically, so that a killed run is
never mistaken for a finished one.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from runners.errors import UserError
from runners.store.files import (
    Damaged,
    disk_error,
    locked,
    read_checked,
    remove_partial,
    sha256_of,
    to_json,
    write_bytes_atomic,
    write_json_atomic,
)
from runners.store.record import SCHEMA_VERSION, Record
from runners.store.redact import redact, redact_text

log = logging.getLogger(__name__)

ITEMS_HASH = "items_sha256"
SPEED_KEY = (
    "seq context batch steps decisions trained threads dtype device kernels graphs neighbours"
).split()
"""What tells timed cases of a point apart."""


class EventLog:
    """`log.jsonl` of a point, a JSON line per event; one that a crash tore is left out on reading.

    Args:
        path: made by the first event.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, event: Mapping[str, Any]) -> None:
        """Add one line, with the wall clock as `unix_time_s`.

        Raises:
            UserError: disk full or not writable.
        """
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_lines([_timed(event)]))
        except OSError as error:
            raise disk_error(self.path, error) from error

    def rewind(self, stage: str, steps: int, curve: Sequence[Mapping[str, Any]] = ()) -> None:
        """Keep of a stage its first `steps` steps alone, each once.

        Where the log lacks one, because it was damaged or another point's process did the step,
        `curve` gives its figures; without them none is kept, for that process's log has them all.
        """
        text = self.path.read_bytes() if self.path.is_file() else b""
        events = []
        for line in text.splitlines():
            with suppress(ValueError):
                events.append(json.loads(line))
        other = [event for event in events if event.get("stage", event.get("name")) != stage]
        own = {e["step"]: e for e in events if e["event"] == "step" and e["stage"] == stage}
        made = {f["step"]: _timed({"event": "step", "stage": stage, **f}) for f in curve}
        done = [event for step, event in sorted((made | own).items()) if step <= steps]
        kept = _lines(other + (done if len(done) == steps else [])).encode()
        if kept != text:
            write_bytes_atomic(self.path, kept)


def _timed(event: Mapping[str, Any]) -> dict[str, Any]:
    return {"unix_time_s": round(time.time(), 3), **to_json(redact(event), "event")}


def _lines(events: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(event) + "\n" for event in events)


def _timed_as(case: Mapping[str, Any]) -> dict[str, Any]:
    """By `SPEED_KEY`; older cases do not say that they had no neighbours."""
    full = {"neighbours": 0, **case}
    return {key: full.get(key) for key in SPEED_KEY}


def sizes(case: Mapping[str, Any]) -> str:
    """Batch and tokens of a timed case, `1x512`."""
    return f"{case['batch']}x{case.get('seq', case.get('context'))}"


class RunFolder:
    """The folder of one point.

    Args:
        path: `<results_dir>/<fingerprint>`; created by `begin` or `lock`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.yaml"
        self.status_file = path / "status.json"
        self.result_file = path / "result.json"
        self.log_file = path / "log.jsonl"
        self.speed_file = path / "speed.json"
        self.items_file = path / "items.parquet"
        self.events = EventLog(self.log_file)

    def lock(self) -> AbstractContextManager[None]:
        """Hold the point; a second process waits here, then finds it complete."""
        waiting = f"another process is at work on {self.path.name}; waiting for it"
        return locked(self.path / ".lock", waiting)

    def begin(self, config: Mapping[str, Any]) -> None:
        """Start the point, or start it again: what an earlier attempt left is removed.

        The log of one that did not come to its end stays, because its stages are gone on with.
        """
        if self.is_complete():
            self.log_file.unlink(missing_ok=True)
        self.result_file.unlink(missing_ok=True)
        self.items_file.unlink(missing_ok=True)
        for folder in (self.path, self.path / "routed"):
            remove_partial(folder)
        shown = to_json(redact(config), "config")
        text = yaml.safe_dump(shown, sort_keys=False, default_flow_style=False)
        write_bytes_atomic(self.config_file, text.encode())
        self._status("running")

    def discard_damaged(self) -> None:
        """Remove a record, or items, that are not what was written, and say so; the point is then
        computed again."""
        try:
            record = read_checked(self.result_file)
            if record.get(ITEMS_HASH) != _file_hash(self.items_file):
                raise Damaged(f"{self.items_file} is damaged")
        except FileNotFoundError:
            return
        except Damaged as error:
            log.warning("%s: the point is computed again", error)
            self.result_file.unlink()
            self.items_file.unlink(missing_ok=True)

    def log(self, event: Mapping[str, Any]) -> None:
        """Append one line to `log.jsonl`, with the wall clock as `unix_time_s`."""
        self.events.append(event)

    def complete(self, record: Record) -> None:
        """Write the result record; from here on the point counts as done."""
        self._write_result(replace(record, speed=self.speed() or None).to_json())
        self._status("complete")

    def add_speed(self, phase: str, case: Mapping[str, Any], timed: Record) -> None:
        """Keep a timed case, in the place of one that was timed alike, and put it into the record.

        A point that was never evaluated gets a record without quality, which does not count as
        complete for a sweep.

        Args:
            phase: `prefill` or `decode`.
            timed: the record without quality.
        """
        speed = {"prefill": [], "decode": [], **self.speed()}
        speed[phase] = [*(c for c in speed[phase] if _timed_as(c) != _timed_as(case)), case]
        write_json_atomic(self.speed_file, redact({"speed": speed}), checked=True)
        record = self.result() or {}
        if record.get("status") != "complete":
            record = timed.to_json()
        self._write_result({**record, "speed": speed})

    def add_generation(self, generation: Mapping[str, Any]) -> None:
        """Put what a complete point generates into its record, in the place of what is there."""
        self._write_result({**(self.result() or {}), "generation": generation})

    def has_generation(self, settings: Mapping[str, Any]) -> bool:
        """Whether the record has what these settings generate."""
        found = (self.result() or {}).get("generation") or {}
        return found.get("settings") == to_json(settings, "settings")

    def is_timed(self, phase: str, case: Mapping[str, Any]) -> bool:
        """Whether a case with these figures was timed, on whatever machine."""
        done = self.speed().get(phase, [])
        return any(case.items() <= _timed_as(other).items() for other in done)

    def speed(self) -> dict[str, Any]:
        """Timed cases by phase; empty if none was, or they are damaged, which is said."""
        try:
            speed: dict[str, Any] = read_checked(self.speed_file)["speed"]
        except FileNotFoundError:
            return {}
        except Damaged as error:
            log.warning("%s: its cases are to be timed again", error)
            return {}
        return speed

    def saved(self) -> None:
        """Training is done and `routed/` written; nothing was evaluated."""
        self._status("saved")

    def fail(self, record: Record) -> None:
        """Keep why the point failed, with what names it, so that the analysis can list it."""
        self._write_result(record.to_json())
        self._status("failed", reason=redact_text(str(record.reason)))

    def interrupted(self, by: str) -> None:
        """A signal ended the run; there is no record, and the next run goes on."""
        try:
            self._status("interrupted", signal=by)
        except (OSError, UserError) as error:  # the run ends as it was asked to, whatever the disk
            log.warning("%s", error)

    def failed(self) -> str | None:
        """Why the point failed, if it did."""
        record = self.result() or {}
        return str(record.get("reason")) if record.get("status") == "failed" else None

    def is_complete(self) -> bool:
        """True if a finished record of this schema is there, quality included."""
        record = self.result() or {}
        return record.get("status") == "complete" and bool(record.get("evaluated", True))

    def result(self) -> dict[str, Any] | None:
        """The record, complete or failed; None if missing, torn or of another schema."""
        try:
            record = read_checked(self.result_file)
        except (FileNotFoundError, Damaged):
            return None
        return record if record.get("schema_version") == SCHEMA_VERSION else None

    def _write_result(self, record: Mapping[str, Any]) -> None:
        items = _file_hash(self.items_file)
        kept = {**record, ITEMS_HASH: items} if items else record
        write_json_atomic(self.result_file, redact(kept), checked=True)

    def _status(self, state: str, **more: Any) -> None:
        status = {"state": state, "pid": os.getpid(), "unix_time_s": round(time.time(), 3)}
        write_json_atomic(self.status_file, {**status, **more})


def _file_hash(path: Path) -> str | None:
    return sha256_of(path) if path.is_file() else None
