"""Routing methods, and what routes a loaded Hugging Face model with one; torch and transformers.

`routed`, `attach`, `RoutedModel`, `from_pretrained` and `save_pretrained` are imported when they
are first asked for: `import methods` alone imports nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

HOMES = {
    "RoutedModel": "methods.engine.model",
    "attach": "methods.engine.routed",
    "from_pretrained": "methods.engine.checkpoint",
    "routed": "methods.engine.routed",
    "save_pretrained": "methods.engine.checkpoint",
}
"""Module of each public name."""


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'methods' has no attribute {name!r}")
    return getattr(importlib.import_module(HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *HOMES})
