"""Which points belong together, by the content of what made them and never by names alone.

The content of a point is its resolved config and its record's identity, without the seed and
without what changes no figure. Points of one content differ in their seed alone, and are averaged.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

Record = Mapping[str, Any]
Flat = Mapping[str, Any]
BLOCK = re.compile(r"^(?=[^\s#-])", re.MULTILINE)
"""A top-level key of a block-style YAML file begins here."""
WHERE = frozenset("results_dir cache_dir tracking force hydra experiment tune".split())
"""Top-level keys of a config that say where and how loudly."""
NO_FIGURE = WHERE | frozenset(
    "saved saved_sha256 retry_failed checkpoint_seconds speed device_map max_memory seed "
    "sparsity report hardware plan trust_method check_weights".split()
)
"""Those that change no figure, and the two that have a column of their own."""
ADDED = "eval.generation"
"""A part of the config that may be measured later, with its settings in the record."""
NO_IDENTITY = frozenset(
    "fingerprint command git python platform device cpu_count torch_threads processes upper_bound "
    "static flops_only packages".split()
)
"""Keys of a record's identity that are no part of the content; any other key is."""
PACKAGES = ("torch", "transformers", "lm_eval")
"""Those whose versions change scores."""
OF_THE_METHOD = frozenset(
    "method target objective mode merge_lora recalibrate base_model trained_on_sha256 "
    "reserve".split()
)
"""Top-level keys that tell the lines of a picture apart; all others tell pictures apart."""
OF_THE_LINE = frozenset({"budget.scale"})
"""Single keys that tell lines apart though their group tells pictures apart."""
PUBLISHED = "_published"
"""Ends the name of a method's file in conf/method that has the recipe of its paper."""
SHOWN = 4
"""Differences that a label names; it counts the others."""
LONGEST = 40


def read_config(folder: Path) -> Flat:
    """Read a point's resolved config as `{"budget.routers.steps": 40}`; {} without one."""
    try:
        text = (folder / "config.yaml").read_text(encoding="utf-8")
    except OSError:
        return {}
    flat: dict[str, Any] = {}
    for block in BLOCK.split(text):
        flat.update(_block(block))
    return {key: value for key, value in flat.items() if key.partition(".")[0] not in WHERE}


@lru_cache(maxsize=4096)
def _block(text: str) -> Flat:
    """One top-level key; thousands of points share most of theirs, and YAML is slow to read."""
    try:
        return flatten(yaml.safe_load(text) or {})
    except (yaml.YAMLError, AttributeError):
        return {}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Join the keys of nested mappings by dots; lists are values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def content(record: Record, config: Flat) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split what made a point into what its picture shares and what is its line's own."""
    identity = record["identity"]
    versions = identity.get("packages") or {}
    own = {k: v for k, v in config.items() if k.partition(".")[0] not in NO_FIGURE}
    own = {k: v for k, v in own.items() if not k.startswith(ADDED)}
    own |= flatten({k: v for k, v in identity.items() if k not in NO_IDENTITY})
    own |= {f"packages.{name}": versions.get(name) for name in PACKAGES}
    setting: dict[str, Any] = {}
    line: dict[str, Any] = {}
    for key, value in own.items():
        if value is not None and not key.endswith(".seed"):  # a newer option that is null is none
            own_line = key in OF_THE_LINE or key.partition(".")[0] in OF_THE_METHOD
            (line if own_line else setting)[key] = value
    return setting, line


def told_apart(names: Sequence[Any], contents: Sequence[Flat]) -> list[str]:
    """Say for each point what tells its content from others of the same name.

    That are the options whose value more than half of those points do not share, so that the usual
    content has no words; hashes where options do not tell; "" where nothing differs.
    """
    texts = [json.dumps(content, sort_keys=True, default=str) for content in contents]
    by_name: dict[Any, list[int]] = {}
    for place, name in enumerate(names):
        by_name.setdefault(name, []).append(place)
    words = [""] * len(texts)
    for places in by_name.values():
        if len({texts[place] for place in places}) > 1:
            own = [contents[place] for place in places]
            said = _differences(own, [texts[place] for place in places])
            for place, word in zip(places, said, strict=True):
                words[place] = word
    return words


def _differences(contents: Sequence[Flat], texts: Sequence[str]) -> list[str]:
    options: list[list[str]] = [[] for _ in contents]
    hashes: list[list[str]] = [[] for _ in contents]
    for key in dict.fromkeys(key for content in contents for key in content):
        values = [_short(key, content.get(key)) for content in contents]
        (usual, count), *others = Counter(values).most_common()
        for place, value in enumerate(values if others else ()):
            if value != usual or 2 * count <= len(values):
                (hashes if key.endswith("sha256") else options)[place].append(value)
    more = [[f"{len(own) - SHOWN} more"] if len(own) > SHOWN else [] for own in options]
    words = [", ".join([*own[:SHOWN], *rest]) for own, rest in zip(options, more, strict=True)]
    marks = [[f"#{hashlib.sha256(text.encode()).hexdigest()[:8]}"] for text in texts]
    for extra in (hashes, marks):
        if len(set(words)) < len(set(texts)):
            words = [", ".join(filter(None, [w, *e])) for w, e in zip(words, extra, strict=True)]
    return words


def _short(key: str, value: Any) -> str:
    text = show(value)[:8] if key.endswith("sha256") else show(value)
    text = text if len(text) <= LONGEST else f"...{text[-LONGEST:]}"
    return f"{key.removeprefix('method.')}={text}"


def show(value: Any) -> str:
    """Write a value as YAML has it."""
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    return str(value)


def label(method: str, *parts: str) -> str:
    """Name a line or a row: the method, and what is said of it in brackets."""
    published = "as published" if method.endswith(PUBLISHED) else ""
    method, said = method.removesuffix(PUBLISHED), ", ".join(filter(None, [published, *parts]))
    return f"{method} ({said})" if said else method
