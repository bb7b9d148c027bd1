"""JSON files that notice damage at any byte: their last key is the hash of all the others."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SEAL = "content_sha256"


class Damaged(ValueError):
    """The file is not what was written; the message says why."""


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """`value` (JSON types) with its seal."""
    kept = {key: part for key, part in value.items() if key != SEAL}
    return {**kept, SEAL: _hash(kept)}


def read_sealed(path: Path, *, strict: bool = True) -> dict[str, Any]:
    """A sealed object without its seal.

    Args:
        strict: False also takes an object that has no seal, of an older version; one with a hash
            under another name has a damaged seal.

    Raises:
        FileNotFoundError: no such file.
        Damaged: unreadable, no JSON object, or another content than was sealed.
    """
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise Damaged(f"{path} is damaged ({error})") from error
    if not isinstance(found, dict):
        raise Damaged(f"{path} is damaged (no JSON object)")
    seal = found.pop(SEAL, None)
    if seal is None and not strict and not any(map(_is_hash, found.values())):
        return found
    if seal != _hash(found):
        raise Damaged(f"{path} is damaged (its content is not what was written)")
    return found


def _hash(value: Mapping[str, Any]) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None
