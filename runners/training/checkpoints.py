"""Checkpoints within a stage: files that a killed run goes on from.

`<step>-<sha256 of the file>.safetensors` in a folder of the stage; what is no tensor is JSON in
the file's header. A file is whole or its content does not match its name, so that damage at any
byte is noticed; the step in the name says which is the last one, no clock does.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from runners.store.files import full_disk

log = logging.getLogger(__name__)

NAME = re.compile(r"(\d+)-([0-9a-f]{64})\.safetensors")
STATE = "state"
KEPT = 2
"""The last one, and the one before should the last be damaged."""
LEAST_SHARE = 50
"""A checkpoint that took a second is followed by so many seconds of work, at least."""


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds."""

    step: int
    tensors: dict[str, Tensor]
    """On the host."""
    state: dict[str, Any]
    """JSON values; floats come back as they were."""


class Checkpoints:
    """Those of one stage.

    Args:
        folder: made when the first is written; None keeps none.
        seconds: work between two; None writes one only where a signal asks for it.
    """

    def __init__(self, folder: Path | None = None, seconds: float | None = None) -> None:
        self.folder, self.seconds = folder, seconds
        self._last, self._cost_s = time.monotonic(), 0.0
        self._told = False

    def due(self) -> bool:
        """Whether the next is worth its time: writing takes at most a fiftieth of all."""
        if self.folder is None or self.seconds is None:
            return False
        wanted = max(self.seconds, LEAST_SHARE * self._cost_s)
        return time.monotonic() - self._last >= wanted

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Write one, whole or not at all; a full disk is said once and the stage goes on.

        Args:
            step: number of finished steps.
            tensors: names and values; copied to the host.
            state: JSON values.
        """
        if self.folder is None:
            return
        began = time.monotonic()
        partial = self.folder / f".{os.getpid()}.tmp"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            on_host = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
            save_file(on_host, str(partial), metadata={STATE: json.dumps(state)})
            digest = _flushed_digest(partial)
            os.replace(partial, self.folder / f"{step:08d}-{digest}.safetensors")
            for _, old in self._files()[KEPT:]:
                old.unlink(missing_ok=True)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            if not self._told:
                said = full_disk(self.folder, error) or error
                log.warning("no checkpoint at step %d, the stage goes on: %s", step, said)
            self._told = True
        self._last = time.monotonic()
        self._cost_s = self._last - began

    def load(self) -> Saved | None:
        """The last whole one; what is damaged is said and left out."""
        for step, path in self._files():
            try:
                return _read(step, path)
            except (OSError, SafetensorError, ValueError, KeyError) as error:
                log.warning("a checkpoint is damaged and left out: %s (%s)", path, error)
        return None

    def clear(self) -> None:
        """Remove them all."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _files(self) -> list[tuple[int, Path]]:
        """(step, file), the last first."""
        if self.folder is None or not self.folder.is_dir():
            return []
        named = ((NAME.fullmatch(path.name), path) for path in self.folder.iterdir())
        return sorted(((int(m[1]), path) for m, path in named if m is not None), reverse=True)


def _read(step: int, path: Path) -> Saved:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest not in path.name:
        raise ValueError("its content is not what was written")
    with safe_open(str(path), framework="pt") as opened:
        # copies, so that memory is aligned as it was and the file may go
        tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
        return Saved(step, tensors, json.loads(opened.metadata()[STATE]))


def _flushed_digest(path: Path) -> str:
    """sha256 of a file whose bytes have reached the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()
