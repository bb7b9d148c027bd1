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

from runners.corpus.source import Document
from runners.errors import UserError
from runners.evaluation.word_problems import Problem, word_problems
from runners.store.files import write_bytes_atomic

GENERATOR_VERSION = 2
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


def addition(documents: Sequence[Document], seed: int) -> list[Item]:
    """The sum of two digits, after three worked sums."""
    rng = random.Random(seed)
    items: list[Item] = []
    for _ in range(ITEMS):
        pairs = [(rng.randint(1, 9), rng.randint(1, 9)) for _ in range(4)]
        worked = " ".join(f"{a} + {b} = {a + b}." for a, b in pairs[:-1])
        total = sum(pairs[-1])
        wrong = rng.sample([total + d for d in (-3, -2, -1, 1, 2, 3) if total + d > 0], CHOICES - 1)
        context = f"{worked} {pairs[-1][0]} + {pairs[-1][1]} ="
        items.append(_shuffled(context, [str(value) for value in (total, *wrong)], rng))
    return items


def progression(documents: Sequence[Document], seed: int) -> list[Item]:
    """Which number continues five terms of an arithmetic progression?"""
    rng = random.Random(seed)
    items: list[Item] = []
    for _ in range(ITEMS):
        start, step = rng.randint(1, 30), rng.randint(2, 9)
        terms = [start + step * index for index in range(6)]
        near = sorted({-step, -2, -1, 1, 2, step + 1})
        wrong = rng.sample([terms[-1] + distance for distance in near], CHOICES - 1)
        context = " ".join(f"{term}," for term in terms[:-1])
        items.append(_shuffled(context, [str(value) for value in (terms[-1], *wrong)], rng))
    return items


COLOURS = "red blue green black white yellow brown gray pink gold".split()


def repetition(documents: Sequence[Document], seed: int) -> list[Item]:
    """Which of the words of a repeated list comes next? All choices were seen equally often."""
    rng = random.Random(seed)
    items: list[Item] = []
    for _ in range(ITEMS):
        words = rng.sample(COLOURS, 5)
        again = rng.randint(1, 3)
        context = " ".join(f"{word}," for word in [*words, *words[:again]])
        wrong = rng.sample([w for w in words if w != words[again]], CHOICES - 1)
        items.append(_shuffled(context, [words[again], *wrong], rng))
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


GENERATORS: dict[str, Callable[[Sequence[Document], int], Sequence[Item | Problem]]] = {
    "continuation_choice": continuation_choice,
    "agreement": agreement,
    "addition": addition,
    "progression": progression,
    "repetition": repetition,
    "word_problems": word_problems,
}
CHOICES_OF = {name: CHOICES for name in GENERATORS if name != "word_problems"} | {"agreement": 2}


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
