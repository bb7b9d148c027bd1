"""Copy the hub's data sets of tasks and texts into JSON Lines, with a manifest of which ones."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

from runners.corpus.source import open_on_hub, reached
from runners.errors import UserError
from runners.evaluation.builtin_tasks import GENERATORS
from runners.evaluation.stock_tasks import StockTask, stock_task
from runners.evaluation.tasks import check_tasks
from runners.evaluation.texts import describe_text
from runners.point_config import EvalConfig
from runners.store.files import sha256_of, write_bytes_atomic, write_json_atomic

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
ELSEWHERE = "this up: run it on a machine that has one and copy the folder"


@dataclass(frozen=True)
class Wanted:
    """One file of the folder and where its records are on the hub."""

    file: str
    """Relative to the folder."""
    path: str
    config_name: str | None
    split: str
    revision: str | None
    records: int | None = None
    """First records only; None for all."""
    data_files: Mapping[str, str] | None = None


def hub_records(wanted: Wanted) -> Iterable[Mapping[str, Any]]:
    """Stream the records of a file, so that a part of a large data set is all that is read."""
    options: dict[str, Any] = {"split": wanted.split, "revision": wanted.revision}
    options |= {"data_files": dict(wanted.data_files)} if wanted.data_files else {}
    with reached(f"data set {wanted.path} for {wanted.file}", ELSEWHERE):
        yield from open_on_hub(wanted.path, wanted.config_name, **options)


def hub_revision(wanted: Wanted) -> str | None:
    """Ask the hub for the commit that a revision names now."""
    from huggingface_hub import HfApi

    with reached(f"data set {wanted.path} for {wanted.file}", ELSEWHERE):
        return HfApi().dataset_info(wanted.path, revision=wanted.revision).sha


def fetch(
    settings: EvalConfig,
    revisions: Mapping[str, str],
    folder: Path,
    read: Callable[[Wanted], Iterable[Mapping[str, Any]]] = hub_records,
    resolve: Callable[[Wanted], str | None] = hub_revision,
) -> Path:
    """Fetch every file that an evaluation reads; one that is there unchanged is kept.

    Returns:
        The manifest's path.

    Raises:
        UserError: the hub is out of reach, or has no such data set or split.
    """
    manifest = _read_manifest(folder)
    for wanted in wanted_files(settings, revisions):
        path, entry = folder / wanted.file, manifest.get(wanted.file, {})
        asked = entry.get("requested_revision", ()) == wanted.revision
        if asked and path.is_file() and sha256_of(path) == entry["sha256"]:
            log.info("%s: already there", wanted.file)
            continue
        revision = resolve(wanted)
        records = islice(read(replace(wanted, revision=revision)), wanted.records)
        lines = [f"{json.dumps(dict(r), ensure_ascii=False, default=str)}\n" for r in records]
        if not lines:
            raise UserError(f"{wanted.path} has no record in split {wanted.split!r}")
        write_bytes_atomic(path, "".join(lines).encode())
        manifest[wanted.file] = {
            **{key: getattr(wanted, key) for key in ("path", "config_name", "split")},
            "requested_revision": wanted.revision,
            "revision": revision,
            "records": len(lines),
            "sha256": sha256_of(path),
        }
        log.info("%s: %d records of %s", wanted.file, len(lines), wanted.path)
        about = {
            "fetched": datetime.now(UTC).isoformat(timespec="seconds"),
            "packages": {name: metadata.version(name) for name in ("datasets", "lm_eval")},
        }
        files = dict(sorted(manifest.items()))
        write_json_atomic(folder / MANIFEST, {**about, "files": files})
    return folder / MANIFEST


def check_fetch(settings: EvalConfig, revisions: Mapping[str, str]) -> None:
    """Refuse unknown tasks and texts, and tasks that no file can serve.

    Raises:
        UserError: one line.
    """
    check_tasks(settings.tasks)
    if not wanted_files(settings, revisions):
        raise UserError("nothing to fetch: eval names no lm-eval task and no text")


def wanted_files(settings: EvalConfig, revisions: Mapping[str, str]) -> list[Wanted]:
    """List the files of the tasks and texts of an evaluation, each once."""
    found: dict[str, Wanted] = {}
    for name in settings.tasks:
        if name not in GENERATORS:
            for wanted in _of_task(stock_task(name, settings.num_fewshot.get(name)), revisions):
                found.setdefault(wanted.file, wanted)
    for name in settings.text_names:
        text = describe_text(name)
        wanted = Wanted(
            file=f"{name}/{text['split']}.jsonl",
            path=text["path"],
            config_name=text["config_name"],
            split=text["split"],
            revision=revisions.get(text["path"], text["revision"]),
            records=text["documents"],
            data_files=text["data_files"],
        )
        found.setdefault(wanted.file, wanted)
    return list(found.values())


def _of_task(task: StockTask, revisions: Mapping[str, str]) -> list[Wanted]:
    """The scored split, and the one that examples come from."""
    path, kwargs = task.config["dataset_path"], task.config.get("dataset_kwargs") or {}
    splits = dict.fromkeys([task.evaluated, task.examples or task.evaluated])
    return [
        Wanted(
            file=f"{task.folder}/{split}.jsonl",
            path=path,
            config_name=task.config.get("dataset_name"),
            split=split,
            revision=revisions.get(path, kwargs.get("revision")),
            data_files=kwargs.get("data_files"),
        )
        for split in splits
    ]


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        files: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return files
