"""Names and files of lm-eval's own tasks, found without its index.

lm-eval parses its 14 000 task files to build that index, half a minute on a slow core; the
top-level `task:`, `group:` and `tag:` lines are all that is needed to find one task.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

NAME = re.compile(
    r"""^['"]?(task|group)['"]?:[ \t]*['"]?([^\s'"#\[\]{}]+)['"]?[ \t]*(?:#.*)?$""", re.M
)
TAG_BLOCK = re.compile(r"""^['"]?tag['"]?:[ \t]*(.*(?:\n[ \t]*-.*)*)""", re.M)
WORD = re.compile(r"[\w.-]+")


@dataclass(frozen=True)
class Stock:
    """What lm-eval brings."""

    tasks: Mapping[str, Path]
    """YAML file of each single task."""
    collections: frozenset[str]
    """Groups and tags."""


@lru_cache(maxsize=1)
def stock() -> Stock:
    """Read lm-eval's task files, once in a process."""
    found = importlib.util.find_spec("lm_eval")
    assert found is not None and found.origin is not None
    tasks: dict[str, Path] = {}
    collections: set[str] = set()
    for path in sorted((Path(found.origin).parent / "tasks").rglob("*")):
        # Files that others include (`_default_yaml`, `prompt_1`) may hold tags, but are no tasks.
        if path.suffix not in ("", ".yaml") or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        names = NAME.findall(text) if path.suffix == ".yaml" else []
        for kind, name in names:
            if kind == "group":
                collections.add(name)
            else:
                tasks.setdefault(name, path)
        for block in TAG_BLOCK.findall(text):
            collections.update(WORD.findall(block))
    return Stock(tasks, frozenset(collections - set(tasks)))


def stock_config(path: Path) -> dict[str, Any]:
    """A task file with its includes, functions left as text."""
    from lm_eval.tasks._yaml_loader import load_yaml

    config: dict[str, Any] = load_yaml(path, resolve_func=False, recursive=True)
    return config
