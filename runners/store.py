"""Where results live: one folder per point, named by what determines its numbers.

`results/<fingerprint>/{config.yaml, status.json, result.json, items.parquet, log.jsonl, routed/}`.
`config.yaml` is written first and `result.json` last, both atomically, so that a killed run is
never mistaken for a finished one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from runners.errors import UserError
from runners.redact import redact, redact_text

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
FINGERPRINT_DIGITS = 16
NOT_IN_FINGERPRINT = frozenset(
    "results_dir cache_dir saved tracking force retry_failed checkpoint_seconds hydra log "
    "log_level logging verbose progress speed".split()
)
"""Top-level keys of the config that say where or how loudly, never what is computed."""

LOCK = ".lock"


def fingerprint(config: Mapping[str, Any]) -> str:
    """Name of a point: sha256 over the canonical JSON of its resolved config, 16 hex digits.

    Numbers that are equal count as equal (`0` and `0.0`); secrets, paths of outputs, tracking and
    logging do not count.
    """
    kept = {key: value for key, value in config.items() if key not in NOT_IN_FINGERPRINT}
    plain = _same_numbers(to_plain(redact(kept), "config"))
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:FINGERPRINT_DIGITS]


def to_plain(value: Any, where: str) -> Any:
    """Value as JSON types; numpy and torch scalars become Python numbers.

    Raises:
        ValueError: NaN, infinity or a type without a JSON form; the message names the key.
    """
    if isinstance(value, Mapping):
        return {str(k): to_plain(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where} is {value}, which JSON cannot hold")
        return float(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [to_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        return to_plain(value.item(), where)
    raise ValueError(f"{where} is a {type(value).__name__}, which JSON cannot hold")


def _same_numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _same_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_same_numbers(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new, never a part.

    Raises:
        UserError: disk full or not writable.
    """
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise disk_error(path, error) from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def write_json_atomic(path: Path, obj: Any) -> None:
    """Write `obj` as indented JSON, atomically.

    Raises:
        ValueError: NaN, infinity or a type without a JSON form; the message names the key.
        UserError: disk full or not writable.
    """
    text = json.dumps(to_plain(obj, path.name), indent=2, allow_nan=False)
    write_bytes_atomic(path, f"{text}\n".encode())


def disk_error(path: Path, error: OSError) -> OSError | UserError:
    """The user's version of an error that a full or read-only disk explains; else the error."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"no space left to write {path}: free some, or choose another folder")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
        return UserError(f"cannot write {path} ({error.strerror}): choose another folder")
    return error


def full_disk(path: Path, error: Exception) -> UserError | None:
    """The user's version of an error that a full disk explains; safetensors gives it as text."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if not full and f"os error {errno.ENOSPC}" not in str(error):
        return None
    return UserError(f"no space left to write {path}: free some, or choose another folder")


def remove_partial(folder: Path, name: str = "") -> None:
    """Remove what writers that were killed have left; who calls this holds the folder's lock."""
    for path in [*folder.glob(f".{name}*"), *folder.glob(f"{name}*.tmp")]:
        if path.is_file() and path.name != LOCK:
            path.unlink(missing_ok=True)


def _is_undone(line: bytes, stage: str, step: int) -> bool:
    try:
        event = json.loads(line)
        kind, name = event["event"], event.get("stage", event.get("name"))
        return name == stage and (kind == "stage" or (kind == "step" and event["step"] > step))
    except (ValueError, KeyError, TypeError, AttributeError):
        return True


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

    def log(self, event: Mapping[str, Any]) -> None:
        """Append one line to `log.jsonl`, with the wall clock as `unix_time_s`."""
        plain = to_plain(redact(event), "event")
        line = json.dumps({"unix_time_s": round(time.time(), 3), **plain})
        try:
            with self.log_file.open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")
        except OSError as error:
            raise disk_error(self.log_file, error) from error

    def go_back(self, stage: str, step: int) -> None:
        """Forget in the log what a stage did after a step, because it is about to do it again.

        Lines that a crash tore are dropped.
        """
        try:
            found = self.log_file.read_bytes()
        except FileNotFoundError:
            return
        kept = [line for line in found.splitlines() if not _is_undone(line, stage, step)]
        text = b"".join(line + b"\n" for line in kept)
        if text != found:
            write_bytes_atomic(self.log_file, text)

    def complete(self, result: Mapping[str, Any]) -> None:
        """Write the result record; from here on the point counts as done."""
        record = {**result, "schema_version": SCHEMA_VERSION, "status": "complete"}
        write_json_atomic(self.result_file, redact({**record, **self._measured_speed()}))
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
        write_json_atomic(self.result_file, redact({**record, "speed": speed}))

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
        write_json_atomic(self.result_file, redact({**(identity or {}), **failed}))
        self._status("failed", reason=redact_text(reason))

    def interrupted(self, by: str) -> None:
        """A signal ended the run; there is no record, and the next run goes on."""
        self._status("interrupted", signal=by)

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
            record = json.loads(self.result_file.read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        if not isinstance(record, dict) or record.get("schema_version") != SCHEMA_VERSION:
            return None
        return record

    def _status(self, state: str, **more: Any) -> None:
        status = {"state": state, "pid": os.getpid(), "unix_time_s": round(time.time(), 3)}
        write_json_atomic(self.status_file, {**status, **more})
