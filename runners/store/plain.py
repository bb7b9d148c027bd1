"""Values as JSON types."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any


def to_plain(value: Any, where: str) -> Any:
    """Value as JSON types; numpy and torch scalars become Python numbers.

    Raises:
        ValueError: NaN, infinity or a type without a JSON form; the message names the key.
    """
    if isinstance(value, Mapping):
        return {str(k): to_plain(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where} is {value}, which JSON cannot hold")
        return float(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [to_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        return to_plain(value.item(), where)
    raise ValueError(f"{where} is a {type(value).__name__}, which JSON cannot hold")
