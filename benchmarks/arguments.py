"""Settings of a benchmark from its command line."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TypeVar

Settings = TypeVar("Settings")


def settings_of(defaults: Settings, words: list[str]) -> Settings:
    """A dataclass of numbers with key=value overrides.

    Raises:
        ValueError: an unknown key, or a value that is no number of the default's type.
    """
    known = {field.name: type(getattr(defaults, field.name)) for field in fields(defaults)}  # type: ignore[arg-type]
    changed = {}
    for word in words:
        key, _, value = word.partition("=")
        try:
            changed[key] = known[key](value)
        except (KeyError, ValueError):
            names = ", ".join(sorted(known))
            raise ValueError(f"{word!r} is not one of {names} = a number") from None
        if not value.replace(".", "", 1).isdigit():
            raise ValueError(f"{word!r} is not a plain number that is at least 0")
    return replace(defaults, **changed)  # type: ignore[type-var]
