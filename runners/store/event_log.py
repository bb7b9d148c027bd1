"""Log a point: one JSON line per event; a line that a crash tore is left out on reading."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from runners.store.files import disk_error, to_json, write_bytes_atomic
from runners.store.redact import redact


class EventLog:
    """`log.jsonl` of a point.

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
