"""One place that decides how progress is shown."""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress(items: Collection[T], label: str, **kwargs: Any) -> tqdm[T]:
    """A bar on a terminal, silence in a log file (a bar there would be thousands of lines)."""
    return tqdm(items, desc=label, leave=False, disable=not sys.stderr.isatty(), **kwargs)
