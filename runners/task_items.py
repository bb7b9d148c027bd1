"""Items of the built-in multiple-choice tasks, generated from text or by rule.

An item is `{context, choices, gold}`; lm-eval joins context and choice with a space. Everything
is cut at white space, so that any tokenizer splits a string there, and one file serves every
model. The same seed and text give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypedDict

from runners.corpus import Document
from runners.errors import UserError
from runners.store import write_bytes_atomic

GENERATOR_VERSION = 1
"""Raise it when the items of a seed change."""

CONTEXT_WORDS = 32
CHOICE_WORDS = 12
"""About 16 tokens of English."""
CHOICES = 4
ITEMS = 1024


class Item(TypedDict):
    """One question."""

    context: str
    choices: list[str]
    gold: int


def continuation_choice(documents: Sequence[Document], seed: int) -> list[Item]:
    """Which of four spans continues the text? The wrong ones come from other documents.

    Raises:
        UserError: fewer than four documents that are long enough.
    """
    words = [document.text.split() for document in documents]
    words = [text for text in words if len(text) >= CONTEXT_WORDS + CHOICE_WORDS]
    if len(words) < CHOICES:
        raise UserError(f"continuation_choice needs {CHOICES} test documents, found {len(words)}")
    rng = random.Random(seed)
    items: list[Item] = []
    for _ in range(ITEMS):
        chosen = rng.sample(words, CHOICES)
        start = rng.randrange(len(chosen[0]) - CONTEXT_WORDS - CHOICE_WORDS + 1)
        cut = start + CONTEXT_WORDS
        spans = [" ".join(chosen[0][cut : cut + CHOICE_WORDS])]
        for text in chosen[1:]:
            begin = rng.randrange(len(text) - CHOICE_WORDS + 1)
            spans.append(" ".join(text[begin : begin + CHOICE_WORDS]))
        items.append(_shuffled(" ".join(chosen[0][start:cut]), spans, rng))
    return items


NAMES = (
    "Anna Ben Carl Dora Emma Fred George Helen Ivan Jack Kate Laura Mark Nancy Oscar Paul Rose "
    "Sarah Tom Victor"
).split()
PLACES = (
    "Paris London Berlin Madrid Rome Vienna Boston Chicago Denver Dallas Seattle Tokyo Moscow "
    "Cairo Dublin Toronto"
).split()


def fact_lookup(documents: Sequence[Document], seed: int) -> list[Item]:
    """Four people live in four cities; where does one of them live?"""
    rng = random.Random(seed)
    items: list[Item] = []
    for _ in range(ITEMS):
        people, cities = rng.sample(NAMES, CHOICES), rng.sample(PLACES, CHOICES)
        facts = " ".join(f"{p} lives in {c}." for p, c in zip(people, cities, strict=True))
        asked = rng.randrange(CHOICES)
        order = [cities[asked], *(c for i, c in enumerate(cities) if i != asked)]
        items.append(_shuffled(f"{facts} Therefore {people[asked]} lives in", order, rng))
    return items


NOUNS = (
    "key:keys author:authors picture:pictures teacher:teachers letter:letters door:doors "
    "student:students worker:workers soldier:soldiers farmer:farmers president:presidents "
    "report:reports law:laws window:windows child:children woman:women"
).split()
VERBS = (("is", "are"), ("was", "were"), ("has", "have"))
LINKS = "near behind beside with".split()


def agreement(documents: Sequence[Document], seed: int) -> list[Item]:
    """The verb that agrees with the subject, across a noun of the other number."""
    rng = random.Random(seed)
    items: list[Item] = []
    for _ in range(ITEMS):
        pairs = [pair.split(":") for pair in rng.sample(NOUNS, 2)]
        number = rng.randrange(2)
        context = f"The {pairs[0][number]} {rng.choice(LINKS)} the {pairs[1][1 - number]}"
        verb = rng.choice(VERBS)
        items.append(_shuffled(context, [verb[number], verb[1 - number]], rng))
    return items


def _shuffled(context: str, spans: Sequence[str], rng: random.Random) -> Item:
    """Item whose right choice, `spans[0]`, stands at a random place."""
    order = rng.sample(range(len(spans)), len(spans))
    return {"context": context, "choices": [spans[i] for i in order], "gold": order.index(0)}


GENERATORS: dict[str, Callable[[Sequence[Document], int], list[Item]]] = {
    "continuation_choice": continuation_choice,
    "fact_lookup": fact_lookup,
    "agreement": agreement,
}
CHOICES_OF = {"continuation_choice": CHOICES, "fact_lookup": CHOICES, "agreement": 2}


def items_folder(root: Path, documents: Sequence[Document], seed: int) -> Path:
    """Folder of the items that this text, seed and generator version give."""
    identity = hashlib.sha256(f"{GENERATOR_VERSION}|{seed}".encode())
    for document in documents:
        identity.update(hashlib.sha256(document.text.encode()).digest())
    return root / identity.hexdigest()[:16]


def write_items(name: str, documents: Sequence[Document], seed: int, folder: Path) -> Path:
    """Generate one task's items as JSON Lines, unless they are there."""
    path = folder / f"{name}.jsonl"
    if not path.exists():
        lines = [json.dumps(item) for item in GENERATORS[name](documents, seed)]
        write_bytes_atomic(path, ("\n".join(lines) + "\n").encode())
    return path
