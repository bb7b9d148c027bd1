"""The log of a point: one JSON line per event, whole after any disturbance.

The last key of a line, `crc32`, is that of all the bytes before it.
"""

from __future__ import annotations

import json
import logging
import re
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runners.store.files import disk_error, write_bytes_atomic
from runners.store.plain import to_plain
from runners.store.redact import redact

log = logging.getLogger(__name__)

LINE = re.compile(rb'(.*), "crc32": "([0-9a-f]{8})"\}')


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
                file.write(_line(event))
        except OSError as error:
            raise disk_error(self.path, error) from error

    def go_back(self, stage: str, step: int, curve: Sequence[Mapping[str, Any]] = ()) -> None:
        """Forget what a stage did after a step, because it is about to do it again.

        Lines that a crash tore are dropped.

        Args:
            curve: figures of the steps up to `step`; those that the log lacks, because it was
                damaged or another point's process did them, are written again.
        """
        found = self.path.read_bytes() if self.path.is_file() else b""
        lines = [line for line in found.splitlines() if _event(line) is not None]
        torn = len(found.splitlines()) - len(lines)
        if torn:
            log.warning("%s: %d damaged lines are left out", self.path, torn)
        kept = [line for line in lines if not _is_undone(line, stage, step)]
        own = {e["step"]: line for line in kept if (e := _step_of(line, stage)) is not None}
        if any(figures["step"] not in own for figures in curve):
            log.info("%s: steps of stage %s are written from its checkpoint", self.path, stage)
            kept = [line for line in kept if _step_of(line, stage) is None]
            kept += [own.get(figures["step"]) or _new(stage, figures) for figures in curve]
        text = b"".join(line + b"\n" for line in kept)
        if text != found:
            write_bytes_atomic(self.path, text)

    def has_curve(self, stage: str, steps: int) -> bool:
        """Whether every step of a stage is there."""
        found = self.path.read_bytes() if self.path.is_file() else b""
        own = {e["step"] for line in found.splitlines() if (e := _step_of(line, stage))}
        return own >= set(range(1, steps + 1))


def _line(event: Mapping[str, Any]) -> str:
    plain = to_plain(redact(event), "event")
    text = json.dumps({"unix_time_s": round(time.time(), 3), **plain}).removesuffix("}")
    return f'{text}, "crc32": "{zlib.crc32(text.encode()):08x}"}}\n'


def _new(stage: str, figures: Mapping[str, Any]) -> bytes:
    return _line({"event": "step", "stage": stage, **figures}).rstrip("\n").encode()


def _event(line: bytes) -> dict[str, Any] | None:
    """The event of a line, None if it is damaged."""
    found = LINE.fullmatch(line)
    if found is None or zlib.crc32(found[1]) != int(found[2], 16):
        return None
    event: dict[str, Any] = json.loads(line)
    return event


def _step_of(line: bytes, stage: str) -> dict[str, Any] | None:
    event = _event(line)
    mine = event is not None and event["event"] == "step" and event.get("stage") == stage
    return event if mine else None


def _is_undone(line: bytes, stage: str, step: int) -> bool:
    event = _event(line)
    if event is None:
        return True
    done = event["event"] == "step" and event["step"] <= step
    return event.get("stage", event.get("name")) == stage and not done
