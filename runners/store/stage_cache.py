"""Cache of what stages produce, keyed by the content of what determines it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import save_file

from methods.base import Method
from methods.engine.checkpoint import BadCheckpoint, load_tensors
from runners.runtime.distributed import broadcast_module, broadcast_object
from runners.runtime.processes import is_main_process
from runners.store.files import disk_error, full_disk, remove_partial, write_json_atomic
from runners.store.plain import to_plain
from runners.store.seal import Damaged, read_sealed, sealed

log = logging.getLogger(__name__)


def content_key(*parts: Any) -> str:
    """sha256 over the canonical JSON of the parts, 32 hex digits."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class Products:
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
        with _locked(path):
            found = broadcast_object(partial(_read_json, path))
            if found is not None:
                return found, True
            remove_partial(self.values, path.name)
            made = make()
            if is_main_process():
                write_json_atomic(path, sealed(to_plain(made, path.name)))
            return made, False

    def stage(
        self, key: str, method: Method, run: Callable[[], Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Bring the method's tensors to the state after a stage: load it, or run and keep it.

        Returns:
            The stage's report, with `cached` set.
        """
        folder = self.stages / key
        with _locked(folder):
            found = broadcast_object(partial(self._load, folder, method))
            if found is not None:
                broadcast_module(method)
                return {**found, "cached": True}
            remove_partial(folder)
            report = dict(run())
            broadcast_module(method)
            if is_main_process():
                self._keep(folder, method, report)
            shutil.rmtree(self.checkpoints(key), ignore_errors=True)
            return {**report, "cached": False}

    def checkpoints(self, key: str) -> Path:
        """Folder of a stage's checkpoints; it is removed when the stage's product is there."""
        return self.stages / key / "checkpoints"

    def _load(self, folder: Path, method: Method) -> dict[str, Any] | None:
        report = _read_json(folder / "report.json")
        if report is None:
            return None
        tensors = folder / "method.safetensors"
        try:
            if _file_hash(tensors) != report.pop("tensors_sha256", None):
                raise BadCheckpoint(f"{tensors} is damaged")
            load_tensors(method, tensors)
        except (BadCheckpoint, SafetensorError, OSError) as error:
            log.warning("cached stage is unusable and will be computed again: %s", error)
            shutil.rmtree(folder, ignore_errors=True)
            return None
        return report

    def _keep(self, folder: Path, method: Method, report: dict[str, Any]) -> None:
        tensors = {k: v.detach().cpu().contiguous() for k, v in method.state_dict().items()}
        partial = folder / f".method.{os.getpid()}.tmp"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, str(partial))
            os.replace(partial, folder / "method.safetensors")
        except (OSError, SafetensorError) as error:
            raise full_disk(folder, error) or error from error
        finally:
            partial.unlink(missing_ok=True)
        digest = _file_hash(folder / "method.safetensors")
        kept = to_plain({**report, "tensors_sha256": digest}, "report")
        write_json_atomic(folder / "report.json", sealed(kept))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a product; the cache folder is created.

    Raises:
        UserError: it cannot be written.
    """
    lock = FileLock(f"{path}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise disk_error(path, error) from error
    try:
        yield
    finally:
        lock.release()


def _read_json(path: Path) -> dict[str, Any] | None:
    """None if there is none that can be used; damage is said."""
    try:
        return read_sealed(path)
    except FileNotFoundError:
        return None
    except Damaged as error:
        log.warning("%s: it will be computed again", error)
        return None


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
