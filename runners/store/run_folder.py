"""Where results live: one folder per point, named by what determines its numbers.

`results/<fingerprint>/{config.yaml, status.json, result.json, items.parquet, log.jsonl, routed/}`.
`config.yaml` is written first and `result.json` last, both atomically, so that a killed run is
never mistaken for a finished one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from runners.errors import UserError
from runners.store.event_log import EventLog
from runners.store.files import (
    LOCK,
    disk_error,
    remove_partial,
    write_bytes_atomic,
    write_json_atomic,
)
from runners.store.plain import to_plain
from runners.store.redact import redact, redact_text
from runners.store.seal import Damaged, read_sealed, sealed

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
ITEMS_HASH = "items_sha256"


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

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the point; a second process waits here, then finds it complete."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(self.path, error) from error
        held = FileLock(self.path / LOCK)
        try:
            held.acquire(timeout=0)
        except Timeout:
            log.info("another process is at work on %s; waiting for it", self.path.name)
            held.acquire()
        except OSError as error:
            raise disk_error(self.path, error) from error
        try:
            yield
        finally:
            held.release()

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
        plain = to_plain(redact(config), "config")
        text = yaml.safe_dump(plain, sort_keys=False, default_flow_style=False)
        write_bytes_atomic(self.config_file, text.encode())
        self._status("running")

    def discard_damaged(self) -> None:
        """Remove a record, or items, that are not what was written, and say so; the point is then
        computed again."""
        try:
            record = read_sealed(self.result_file, strict=False)
        except FileNotFoundError:
            return
        except Damaged as error:
            log.warning("%s: the point is computed again", error)
            self.result_file.unlink(missing_ok=True)
            return
        written = record.get(ITEMS_HASH)
        if written is not None and written != _file_hash(self.items_file):
            log.warning("%s is damaged: the point is computed again", self.items_file)
            self.result_file.unlink(missing_ok=True)
            self.items_file.unlink(missing_ok=True)

    def log(self, event: Mapping[str, Any]) -> None:
        """Append one line to `log.jsonl`, with the wall clock as `unix_time_s`."""
        self.events.append(event)

    def complete(self, result: Mapping[str, Any]) -> None:
        """Write the result record; from here on the point counts as done."""
        record = {**result, "schema_version": SCHEMA_VERSION, "status": "complete"}
        items = _file_hash(self.items_file)
        record |= {} if items is None else {ITEMS_HASH: items}
        self._write_result({**record, **self._measured_speed()})
        self._status("complete")

    def add_speed(self, speed: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
        """Keep measured speed, and put it into the record.

        A point that was never evaluated gets a record without quality, which does not count as
        complete for a sweep.
        """
        write_json_atomic(self.speed_file, redact({"speed": speed, **identity}))
        record = self.result() or {}
        if record.get("status") != "complete":
            record = {**identity, "evaluated": False, "perplexity": {}, "accuracy": {}}
            record |= {"schema_version": SCHEMA_VERSION, "status": "complete"}
        self._write_result({**record, "speed": speed})

    def _measured_speed(self) -> dict[str, Any]:
        try:
            return {"speed": json.loads(self.speed_file.read_bytes())["speed"]}
        except (OSError, ValueError, KeyError):
            return {}

    def saved(self) -> None:
        """Training is done and `routed/` written; nothing was evaluated."""
        self._status("saved")

    def fail(self, reason: str, identity: Mapping[str, Any] | None = None) -> None:
        """Keep why the point failed, with what identifies it, so that the analysis can list it."""
        failed = {"schema_version": SCHEMA_VERSION, "status": "failed", "reason": reason}
        self._write_result({**(identity or {}), **failed})
        self._status("failed", reason=redact_text(reason))

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
            record = read_sealed(self.result_file, strict=False)
        except (FileNotFoundError, Damaged):
            return None
        return record if record.get("schema_version") == SCHEMA_VERSION else None

    def _write_result(self, record: Mapping[str, Any]) -> None:
        write_json_atomic(self.result_file, sealed(to_plain(redact(record), "record")))

    def _status(self, state: str, **more: Any) -> None:
        status = {"state": state, "pid": os.getpid(), "unix_time_s": round(time.time(), 3)}
        write_json_atomic(self.status_file, {**status, **more})


def _file_hash(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None
