"""Cache what stages produce, keyed by the content of what determines it."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from methods.base import Method
from methods.engine.checkpoint import BadCheckpoint, load_tensors
from runners.runtime.distributed import broadcast_module, broadcast_object
from runners.runtime.processes import is_main_process
from runners.store.files import (
    Damaged,
    locked,
    read_checked,
    read_tensors,
    remove_partial,
    to_json,
    write_json_atomic,
    write_tensors,
)

log = logging.getLogger(__name__)

T = TypeVar("T")


def content_key(*parts: Any) -> str:
    """sha256 over the canonical JSON of the parts, 32 hex digits."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class StageCache:
    """Folder of products; two processes that need the same one make it once.

    Processes that train together ask for the same product at the same time: the first one reads
    or keeps it, and tells the others.

    Args:
        root: cache folder; products live in `<root>/stages` and `<root>/values`. One of its own
            for a process that does not lead.
    """

    def __init__(self, root: Path) -> None:
        self.stages, self.values = root / "stages", root / "values"

    def value(self, key: str, make: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any], bool]:
        """A JSON product: (value, whether it was cached)."""
        path = self.values / f"{key}.json"
        with locked(Path(f"{path}.lock")):
            found = broadcast_object(partial(_read, path, read_checked))
            if found is not None:
                return found, True
            remove_partial(path)
            made = make()
            if is_main_process():
                write_json_atomic(path, made, checked=True)
            return made, False

    def load_or_run(
        self, key: str, method: Method, run: Callable[[], Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Bring the method's tensors to the state after a stage: load it, or run and keep it.

        Returns:
            The stage's report, with `cached` set.
        """
        path = self.product(key)
        with locked(Path(f"{path}.lock")):
            found = broadcast_object(partial(_load, path, method))
            report = {**(dict(run()) if found is None else found), "cached": found is not None}
            broadcast_module(method)
            if found is None and is_main_process():
                remove_partial(path)
                write_tensors(path, method.state_dict(), to_json(report, "report"))
                remove_partial(self.checkpoint(key))
                self.checkpoint(key).unlink(missing_ok=True)
            return report

    def product(self, key: str) -> Path:
        """File of a stage's tensors and report."""
        return self.stages / f"{key}.safetensors"

    def checkpoint(self, key: str) -> Path:
        """File that the stage goes on from; it is removed when the stage's product is there."""
        return self.stages / f"{key}.checkpoint"


def _load(path: Path, method: Method) -> dict[str, Any] | None:
    """The report of a product whose tensors are now the method's; None if there is none."""
    found = _read(path, read_tensors)
    if found is None:
        return None
    try:
        load_tensors(method, found[0], path)
    except BadCheckpoint as error:
        log.warning("%s: it will be computed again", error)
        return None
    return found[1]


def _read(path: Path, read: Callable[[Path], T]) -> T | None:
    """None if there is none that can be used; damage is said."""
    try:
        return read(path)
    except FileNotFoundError:
        return None
    except Damaged as error:
        log.warning("%s: it will be computed again", error)
        return None
