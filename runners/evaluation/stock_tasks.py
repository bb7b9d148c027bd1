"""Stock lm-eval tasks read from local JSON Lines: only the data set paths are overridden.

A folder holds `<task>/<split>.jsonl`, with the fields of the task's hub data set. Prompt, metric
and every other line of the stock task stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runners.errors import UserError
from runners.evaluation.stock import stock, stock_config

FOLDERS = {"wikitext": "wikitext2"}
"""Tasks whose folder has another name than the task."""
SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


@dataclass(frozen=True)
class LocalTask:
    """What a stock task wants of a data folder."""

    name: str
    stock: Path
    """Its YAML file in lm-eval."""
    splits: Mapping[str, str]
    """Which of `SPLITS` it uses, and the data set's name of each."""
    shots: int
    evaluated: str
    """Name of the split that is scored."""
    examples: str | None
    """Name of the split that the examples of the prompt come from; None without examples."""

    @property
    def folder(self) -> str:
        """Its folder inside the data folder."""
        return FOLDERS.get(self.name, self.name)

    def files(self, data_dir: Path) -> dict[str, Path]:
        """Existing file of each data set split that the task names."""
        names = sorted(set(self.splits.values()))
        found = {name: data_dir / self.folder / f"{name}.jsonl" for name in names}
        return {name: path.resolve() for name, path in found.items() if path.is_file()}

    def missing(self, data_dir: Path) -> list[str]:
        """Files that the protocol needs and the folder lacks, each with the reason."""
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

    def override(self, data_dir: Path, cache_dir: Path) -> dict[str, Any]:
        """The task as a YAML file that includes the stock one."""
        found = self.files(data_dir)
        absent = {key: None for key, name in self.splits.items() if name not in found}
        return {
            "include": str(self.stock),
            "task": self.name,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {
                "data_files": {name: str(path) for name, path in found.items()},
                "cache_dir": str(cache_dir),
            },
            **absent,
        }


def local_task(name: str, num_fewshot: int | None) -> LocalTask:
    """Read a stock task's file.

    Args:
        num_fewshot: None for the task's own number.

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
    shots = own if num_fewshot is None or own == 0 else num_fewshot
    in_file = isinstance((config.get("fewshot_config") or {}).get("samples"), list)
    source = splits.get("fewshot_split", splits.get("training_split", evaluated))
    examples = source if shots and not in_file else None
    return LocalTask(name, path, splits, int(shots or 0), evaluated, examples)


def missing_files(
    names: Sequence[str], data_dir: Path, num_fewshot: Mapping[str, int | None]
) -> list[str]:
    """Every file that these tasks need and the folder lacks."""
    tasks = [local_task(name, num_fewshot.get(name)) for name in names]
    return [lacking for task in tasks for lacking in task.missing(data_dir)]


def task_file(
    name: str, data_dir: Path | None, num_fewshot: int | None, cache_dir: Path
) -> dict[str, Any]:
    """A stock task as a YAML file of ours, which lm-eval finds without reading all of its own.

    Args:
        data_dir: None leaves the task as it is; else its data comes from there.

    Raises:
        UserError: a file that is needed is missing.
    """
    if data_dir is None:
        return {"include": str(stock().tasks[name]), "task": name}
    task = local_task(name, num_fewshot)
    lacking = task.missing(data_dir)
    if lacking:
        raise UserError(f"eval.data_dir={data_dir} lacks {', '.join(lacking)}")
    return task.override(data_dir, cache_dir)
