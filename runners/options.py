"""Check options against type hints: the one place that looks at an option's type, range or choice.

A section of the config is a frozen dataclass, a method's options are its constructor's parameters;
whoever adds one says what it may be in its hint, and it is checked.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import json
import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import annotated_types
from pydantic import ConfigDict, PydanticSchemaGenerationError, TypeAdapter, ValidationError

from runners.errors import UserError

T = TypeVar("T")

STRICT = ConfigDict(strict=True, allow_inf_nan=False)
"""Nothing is converted: `no` is a string and no boolean, 1.5 is no whole number."""
RANGES = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
"""Attributes of a hint's range markers, whoever defined their classes."""
WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def parse_section(section: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    """Make a dataclass of the values of a section.

    Args:
        prefix: of the section's options in messages, `budget.` or nothing.

    Raises:
        UserError: one line: what is wrong, and what is allowed.
    """
    assert is_dataclass(section)
    needed = {f.name for f in fields(section) if f.default is f.default_factory is MISSING}
    parsed = _parse_all(_hints(section), needed, values, prefix)
    try:
        return section(**parsed)
    except ValueError as error:
        raise UserError(f"{prefix.rstrip('.')}: {error}") from error


def parse_arguments(target: type, values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Keyword arguments of a constructor, options that it groups in a dataclass made into one.

    Raises:
        UserError: as `parse_section`.
    """
    parameters = list(inspect.signature(target).parameters.values())
    try:
        known = _hints(target.__init__)  # type: ignore[misc]
    except NameError:  # a hint that only type checkers can import
        known = {}
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    hints = {p.name: known.get(p.name, Any) for p in named}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        hints |= {name: Any for name in values if name not in hints}
    needed = {p.name for p in named if p.default is p.empty}
    return _parse_all(hints, needed, values, prefix)


def parse_value(hint: Any, value: Any, name: str) -> Any:
    """Check one value; a mapping for a dataclass becomes one, a list for a tuple a tuple.

    Raises:
        UserError: as `parse_section`.
    """
    section = next((part for part in (hint, *get_args(hint)) if is_dataclass(part)), None)
    if section is not None and isinstance(value, Mapping):
        return parse_section(section, value, f"{name}.")  # type: ignore[arg-type]
    try:
        return _adapter(hint).validate_json(json.dumps(value))
    except ValidationError:
        said = f"{name} must be {describe(hint)}, not {_shown(value)}"
        if isinstance(value, str) and get_origin(hint) in (tuple, Sequence, list):
            said += f": write {name}=[{value}]"
        elif isinstance(value, str):
            said += nearest(value, [str(choice) for choice in _choices(hint)])
        raise UserError(said) from None


def unknown(
    kind: str, word: str, known: Collection[str], elsewhere: Collection[str] = ()
) -> UserError:
    """The error of a name that nobody knows, with the nearest one that is known.

    Args:
        elsewhere: dotted names beside those of the same section, of which one may end alike.
    """
    last = word.rpartition(".")[2]
    moved = [name for name in elsewhere if name.rpartition(".")[2] == last]
    hint = nearest(word, moved or known)
    return UserError(f"unknown {kind} {word!r}{hint}; known: {', '.join(sorted(known))}")


def nearest(word: str, known: Collection[str]) -> str:
    """`, did you mean ...?`; nothing where no known word is like it."""
    found = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {found[0]}?)" if found else ""


def describe(hint: Any) -> str:
    """What a hint allows, as a user would say it."""
    base, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    bounds = {name: getattr(m, name) for m in marks for name in RANGES if hasattr(m, name)}
    said = _describe(base)
    if len(bounds) == 2:
        opening, closing = "[" if "ge" in bounds else "(", "]" if "le" in bounds else ")"
        low, high = (bounds[name] for name in RANGES if name in bounds)
        return f"{said} in {opening}{low:g}, {high:g}{closing}"
    return said + "".join(f" {RANGES[name]} {bound:g}" for name, bound in bounds.items())


def _describe(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return f"one of {', '.join(str(choice).lower() for choice in get_args(hint))}"
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(describe, get_args(hint)))
    if get_origin(hint) in (tuple, list, Sequence):
        inner = [part for part in get_args(hint) if part is not Ellipsis]
        return f"a list in brackets, each {describe(inner[0])}" if inner else "a list in brackets"
    if is_dataclass(hint):
        return f"{{{', '.join(f'{f.name}: ...' for f in fields(hint))}}}"
    if get_origin(hint) in (Mapping, dict) or hint in (Mapping, dict):
        return "a mapping like {name: value}"
    return "null" if hint is NoneType else WORDS.get(hint, getattr(hint, "__name__", str(hint)))


def _parse_all(
    hints: Mapping[str, Any], needed: Collection[str], values: Mapping[str, Any], prefix: str
) -> dict[str, Any]:
    for name in values:
        if name not in hints:
            raise unknown("option", f"{prefix}{name}", [f"{prefix}{known}" for known in hints])
    if missing := [name for name in hints if name in needed and name not in values]:
        raise UserError(
            f"{prefix}{missing[0]} is missing: it must be {describe(hints[missing[0]])}"
        )
    return {name: parse_value(hints[name], value, prefix + name) for name, value in values.items()}


@functools.cache
def _hints(owner: Any) -> dict[str, Any]:
    return get_type_hints(owner, include_extras=True)


@functools.cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    try:
        return TypeAdapter(_for_pydantic(hint), config=STRICT)
    except PydanticSchemaGenerationError:  # a class of the method's own, which no text can be
        return TypeAdapter(Any)


def _for_pydantic(hint: Any) -> Any:
    """The hint with its ranges in pydantic's words; a dataclass is any mapping, parsed apart."""
    if is_dataclass(hint):
        return dict[str, Any]
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        marks = [
            getattr(annotated_types, name.capitalize())(getattr(mark, name))
            for mark in parts[1:]
            for name in RANGES
            if hasattr(mark, name)
        ]
        base = _for_pydantic(parts[0])
        return Annotated[base, *marks] if marks else base
    if origin in (None, Literal):
        return hint
    inner = tuple(part if part is Ellipsis else _for_pydantic(part) for part in parts)
    return functools.reduce(operator.or_, inner) if origin is UnionType else origin[inner]


def _choices(hint: Any) -> list[Any]:
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    return [choice for part in get_args(hint) for choice in _choices(part)]


def _shown(value: Any) -> str:
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
