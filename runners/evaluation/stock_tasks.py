"""Find lm-eval's own tasks without its index, and read their data from local JSON Lines.

lm-eval parses its 14 000 task files to build an index, half a minute on a slow core; the top-level
`task:`, `group:` and `tag:` lines are all that is needed to find one task. A data folder holds
`<task>/<split>.jsonl`, with the fields of the task's hub data set: only the paths of the data are
overridden, prompt, metric and every other line of the stock task stay as they are.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from runners.errors import UserError

NAME = re.compile(
    r"""^['"]?(task|group)['"]?:[ \t]*['"]?([^\s'"#\[\]{}]+)['"]?[ \t]*(?:#.*)?$""", re.M
)
TAG_BLOCK = re.compile(r"""^['"]?tag['"]?:[ \t]*(.*(?:\n[ \t]*-.*)*)""", re.M)
WORD = re.compile(r"[\w.-]+")
FOLDERS = {"wikitext": "wikitext2"}
"""Tasks whose folder has another name than the task."""
SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


@dataclass(frozen=True)
class Stock:
    """What lm-eval brings."""

    tasks: Mapping[str, Path]
    """YAML file of each single task."""
    collections: frozenset[str]
    """Groups and tags."""


@lru_cache(maxsize=1)
def stock() -> Stock:
    """Read the names in lm-eval's task files, once in a process."""
    found = importlib.util.find_spec("lm_eval")
    assert found is not None and found.origin is not None
    tasks: dict[str, Path] = {}
    collections: set[str] = set()
    for path in sorted((Path(found.origin).parent / "tasks").rglob("*")):
        # Files that others include (`_default_yaml`, `prompt_1`) may hold tags, but are no tasks.
        if path.suffix not in ("", ".yaml") or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        for kind, name in NAME.findall(text) if path.suffix == ".yaml" else []:
            if kind == "group":
                collections.add(name)
            else:
                tasks.setdefault(name, path)
        for block in TAG_BLOCK.findall(text):
            collections.update(WORD.findall(block))
    return Stock(tasks, frozenset(collections - set(tasks)))


@dataclass(frozen=True)
class StockTask:
    """What a stock task wants of a data folder."""

    name: str
    file: Path
    """Its YAML file in lm-eval."""
    config: Mapping[str, Any]
    shots: int
    evaluated: str
    """Name of the split that is scored."""
    examples: str | None
    """Name of the split that the examples of the prompt come from; None without examples."""

    @property
    def splits(self) -> dict[str, str]:
        """Which of `SPLITS` it uses, and the data set's name of each."""
        return {key: self.config[key] for key in SPLITS if isinstance(self.config.get(key), str)}

    @property
    def folder(self) -> str:
        """Its folder inside the data folder."""
        return FOLDERS.get(self.name, self.name)

    def files(self, data_dir: Path) -> dict[str, Path]:
        """List the file that is there of each data set split that the task names."""
        names = sorted(set(self.splits.values()))
        found = {name: data_dir / self.folder / f"{name}.jsonl" for name in names}
        return {name: path.resolve() for name, path in found.items() if path.is_file()}

    def missing(self, data_dir: Path) -> list[str]:
        """List the files that the protocol needs and the folder lacks, each with the reason."""
        found = self.files(data_dir)
        lacking = []
        if self.evaluated not in found:
            lacking.append(f"{self.folder}/{self.evaluated}.jsonl")
        if self.examples is not None and self.examples not in found:
            lacking.append(
                f"{self.folder}/{self.examples}.jsonl (examples of the {self.shots}-shot prompt; "
                f"without it: ++eval.num_fewshot.{self.name}=0)"
            )
        return lacking


def stock_config(path: Path) -> dict[str, Any]:
    """Read a task file with its includes, functions left as text."""
    from lm_eval.tasks._yaml_loader import load_yaml

    config: dict[str, Any] = load_yaml(path, resolve_func=False, recursive=True)
    return config


def stock_task(name: str, num_fewshot: int | None) -> StockTask:
    """Read a stock task's file; `num_fewshot` None is the task's own number.

    Raises:
        UserError: a group, or a task without a data set of its own.
    """
    path = stock().tasks.get(name)
    if path is None:
        raise UserError(f"eval.data_dir serves single lm-eval tasks, not {name!r}; name its tasks")
    config = stock_config(path)
    splits = {key: config[key] for key in SPLITS if isinstance(config.get(key), str)}
    evaluated = splits.get("test_split", splits.get("validation_split"))
    if "class" in config or not config.get("dataset_path") or evaluated is None:
        raise UserError(f"eval.data_dir cannot serve task {name!r}: its data is made by code")
    own = config.get("num_fewshot")
    shots = int((own if num_fewshot is None or own == 0 else num_fewshot) or 0)
    in_file = isinstance((config.get("fewshot_config") or {}).get("samples"), list)
    source = splits.get("fewshot_split", splits.get("training_split", evaluated))
    examples = source if shots and not in_file else None
    return StockTask(name, path, config, shots, evaluated, examples)


def missing_files(
    names: Sequence[str], data_dir: Path, num_fewshot: Mapping[str, int | None]
) -> list[str]:
    """List every file that these tasks need and the folder lacks."""
    tasks = [stock_task(name, num_fewshot.get(name)) for name in names]
    return [lacking for task in tasks for lacking in task.missing(data_dir)]


def task_file(
    name: str, data_dir: Path | None, num_fewshot: int | None, cache_dir: Path
) -> dict[str, Any]:
    """Write a stock task as a YAML file of ours, which lm-eval finds without reading all its own.

    Args:
        data_dir: None leaves the task as it is; else its data comes from there.

    Raises:
        UserError: a file that is needed is missing.
    """
    if data_dir is None:
        return {"include": str(stock().tasks[name]), "task": name}
    task = stock_task(name, num_fewshot)
    if lacking := task.missing(data_dir):
        raise UserError(f"eval.data_dir={data_dir} lacks {', '.join(lacking)}")
    found = task.files(data_dir)
    absent = [key for key, name in task.splits.items() if name not in found]
    return {
        "include": str(task.file),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {name: str(path) for name, path in found.items()},
            "cache_dir": str(cache_dir),
        },
        **dict.fromkeys(absent),
    }
