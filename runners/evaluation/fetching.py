"""Copies hub data sets into JSON Lines, with a manifest that says which ones."""

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

from runners.errors import UserError
from runners.evaluation.builtin_tasks import GENERATORS
from runners.evaluation.stock import stock_config
from runners.evaluation.stock_tasks import LocalTask, local_task
from runners.evaluation.tasks import check_tasks
from runners.evaluation.texts import describe_text
from runners.store.files import sha256_of, write_bytes_atomic, write_json_atomic

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Wanted:
    """One file of the folder and where its records are on the hub."""

    file: str
    """Relative to the folder."""
    path: str
    config_name: str | None
    split: str
    revision: str | None
    records: int | None
    """First records only; None for all."""
    data_files: Mapping[str, str] | None = None
    optional: bool = False


Reader = Callable[[Wanted], Iterable[Mapping[str, Any]]]
"""Records of a file."""
Resolver = Callable[[Wanted], str | None]
"""The commit that a revision names now."""


def fetch(
    config: Mapping[str, Any], read: Reader | None = None, resolve: Resolver | None = None
) -> Path:
    """Fetch every file that a config's `eval` reads.

    Args:
        config: `eval`, `out_dir`, `revisions`.
        read, resolve: the hub, unless given.

    Returns:
        The manifest's path.

    Raises:
        UserError: the hub is out of reach, or has no such data set or split.
    """
    folder = Path(config["out_dir"]).expanduser()
    manifest = _read_manifest(folder)
    for wanted in wanted_files(config["eval"], config.get("revisions") or {}):
        entry = manifest.get(wanted.file)
        if entry is not None and _unchanged(folder, wanted, entry):
            log.info("%s: already there", wanted.file)
            continue
        revision = (resolve or _hub_revision)(wanted)
        lines = _lines((read or _hub_records)(replace(wanted, revision=revision)), wanted)
        write_bytes_atomic(folder / wanted.file, "".join(lines).encode())
        manifest[wanted.file] = {
            "path": wanted.path,
            "config_name": wanted.config_name,
            "split": wanted.split,
            "requested_revision": wanted.revision,
            "revision": revision,
            "records": len(lines),
            "sha256": sha256_of(folder / wanted.file),
        }
        log.info("%s: %d records of %s", wanted.file, len(lines), wanted.path)
        _write_manifest(folder, manifest)
    _write_manifest(folder, manifest)
    return folder / MANIFEST


def check_fetch(config: Mapping[str, Any]) -> None:
    """Refuse unknown tasks and texts, and tasks that no file can serve.

    Raises:
        UserError: one line.
    """
    check_tasks(config["eval"]["tasks"])
    if not wanted_files(config["eval"], config["revisions"] or {}):
        raise UserError("nothing to fetch: eval names no lm-eval task and no text")


def wanted_files(settings: Mapping[str, Any], revisions: Mapping[str, str]) -> list[Wanted]:
    """Files of the tasks and texts of an `eval` config, each once."""
    shots = settings.get("num_fewshot") or {}
    found: dict[str, Wanted] = {}
    for name in settings["tasks"]:
        if name not in GENERATORS:
            for wanted in _of_task(local_task(name, shots.get(name)), revisions):
                found.setdefault(wanted.file, wanted)
    long = settings.get("long_context")
    for name in dict.fromkeys([*settings["texts"], *([long["text"]] if long else [])]):
        text = describe_text(name)
        wanted = Wanted(
            file=f"{name}/{text['split']}.jsonl",
            path=text["path"],
            config_name=text["config_name"],
            split=text["split"],
            revision=revisions.get(text["path"], text["revision"]),
            records=text["documents"],
            data_files=text["data_files"],
            optional=text["optional"],
        )
        found.setdefault(wanted.file, wanted)
    return list(found.values())


def _of_task(task: LocalTask, revisions: Mapping[str, str]) -> list[Wanted]:
    """The scored split, and the one that examples come from."""
    config = stock_config(task.stock)
    splits = [task.evaluated, *([task.examples] if task.examples is not None else [])]
    kwargs = config.get("dataset_kwargs") or {}
    return [
        Wanted(
            file=f"{task.folder}/{split}.jsonl",
            path=config["dataset_path"],
            config_name=config.get("dataset_name"),
            split=split,
            revision=revisions.get(config["dataset_path"], kwargs.get("revision")),
            records=None,
            data_files=kwargs.get("data_files"),
        )
        for split in dict.fromkeys(splits)
    ]


def _lines(records: Iterable[Mapping[str, Any]], wanted: Wanted) -> list[str]:
    lines = [
        f"{json.dumps(dict(record), ensure_ascii=False, default=str)}\n"
        for record in islice(records, wanted.records)
    ]
    if not lines:
        raise UserError(f"{wanted.path} has no record in split {wanted.split!r}")
    return lines


def _hub_records(wanted: Wanted) -> Iterable[Mapping[str, Any]]:
    import datasets

    options: dict[str, Any] = {"split": wanted.split, "revision": wanted.revision}
    options |= {"data_files": dict(wanted.data_files)} if wanted.data_files else {}
    # A part is streamed, so that a large data set is not downloaded for its first records.
    options["streaming"] = wanted.records is not None
    try:
        yield from datasets.load_dataset(wanted.path, wanted.config_name, **options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise _unreachable(wanted, error) from error


def _hub_revision(wanted: Wanted) -> str | None:
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(wanted.path, revision=wanted.revision).sha
    except Exception as error:  # the hub's client raises a new kind with most releases
        raise _unreachable(wanted, error) from error


def _unreachable(wanted: Wanted, error: Exception) -> UserError:
    lines = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"
    return UserError(
        f"cannot fetch {wanted.path} for {wanted.file} ({reason}): this command needs the hub; "
        "run it where there is a network and copy the folder"
    )


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        files: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return files


def _write_manifest(folder: Path, files: Mapping[str, Any]) -> None:
    about = {
        "fetched": datetime.now(UTC).isoformat(timespec="seconds"),
        "packages": {name: metadata.version(name) for name in ("datasets", "lm_eval")},
    }
    write_json_atomic(folder / MANIFEST, {**about, "files": dict(sorted(files.items()))})


def _unchanged(folder: Path, wanted: Wanted, entry: Mapping[str, Any]) -> bool:
    """True if the file is the one of the manifest, read as it is wanted now."""
    path = folder / wanted.file
    same = entry.get("requested_revision") == wanted.revision
    return same and path.is_file() and sha256_of(path) == entry.get("sha256")
