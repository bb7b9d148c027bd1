"""Generate the items of the built-in tasks from text or by rule, and write their lm-eval files.

An item of multiple choice is `{context, choices, gold}`; lm-eval joins context and choice with a
space. Everything is cut at white space, so that any tokenizer splits a string there, and one file
serves every model. The same seed and text give the same bytes.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from runners.corpus.source import Document, digest
from runners.errors import UserError
from runners.store.files import write_bytes_atomic

GENERATOR_VERSION = 2
"""Raise it when the items of a seed change."""

CONTEXT_WORDS = 32
CHOICE_WORDS = 12
"""About 16 tokens of English."""
CHOICES = 4
ITEMS = 1024
TEMPLATES = Path(__file__).resolve().parents[2] / "conf" / "eval" / "tasks"

Item = Mapping[str, Any]
"""One question: `context`, `choices`, `gold`; of a generated answer `question` and `answer`."""


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
    items = []
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


def addition(rng: random.Random) -> Item:
    """The sum of two digits, after three worked sums."""
    pairs = [(rng.randint(1, 9), rng.randint(1, 9)) for _ in range(4)]
    worked = " ".join(f"{a} + {b} = {a + b}." for a, b in pairs[:-1])
    total = sum(pairs[-1])
    wrong = rng.sample([total + d for d in (-3, -2, -1, 1, 2, 3) if total + d > 0], CHOICES - 1)
    context = f"{worked} {pairs[-1][0]} + {pairs[-1][1]} ="
    return _shuffled(context, [str(value) for value in (total, *wrong)], rng)


def progression(rng: random.Random) -> Item:
    """Which number continues five terms of an arithmetic progression?"""
    start, step = rng.randint(1, 30), rng.randint(2, 9)
    terms = [start + step * index for index in range(6)]
    near = sorted({-step, -2, -1, 1, 2, step + 1})
    wrong = rng.sample([terms[-1] + distance for distance in near], CHOICES - 1)
    context = " ".join(f"{term}," for term in terms[:-1])
    return _shuffled(context, [str(value) for value in (terms[-1], *wrong)], rng)


COLOURS = "red blue green black white yellow brown gray pink gold".split()


def repetition(rng: random.Random) -> Item:
    """Which of the words of a repeated list comes next? All choices were seen equally often."""
    words = rng.sample(COLOURS, 5)
    again = rng.randint(1, 3)
    context = " ".join(f"{word}," for word in [*words, *words[:again]])
    wrong = rng.sample([w for w in words if w != words[again]], CHOICES - 1)
    return _shuffled(context, [words[again], *wrong], rng)


NOUNS = (
    "key:keys author:authors picture:pictures teacher:teachers letter:letters door:doors "
    "student:students worker:workers soldier:soldiers farmer:farmers president:presidents "
    "report:reports law:laws window:windows child:children woman:women"
).split()
VERBS = (("is", "are"), ("was", "were"), ("has", "have"))
LINKS = "near behind beside with".split()


def agreement(rng: random.Random) -> Item:
    """The verb that agrees with the subject, across a noun of the other number."""
    pairs = [pair.split(":") for pair in rng.sample(NOUNS, 2)]
    number = rng.randrange(2)
    context = f"The {pairs[0][number]} {rng.choice(LINKS)} the {pairs[1][1 - number]}"
    verb = rng.choice(VERBS)
    return _shuffled(context, [verb[number], verb[1 - number]], rng)


def _shuffled(context: str, spans: Sequence[str], rng: random.Random) -> Item:
    """Item whose right choice, `spans[0]`, stands at a random place."""
    order = rng.sample(range(len(spans)), len(spans))
    return {"context": context, "choices": [spans[i] for i in order], "gold": order.index(0)}


NAMES = (
    "Anna Ben Carl Dora Emma Fred George Helen Ivan Jack Kate Laura Mark Nancy Oscar Paul Rose "
    "Sarah Tom Victor"
).split()
THINGS = "apples books coins cards shells stamps eggs pens".split()


def word_problem(rng: random.Random) -> Item:
    """Arithmetic with a worked answer in the form of GSM8K (Cobbe et al. 2021).

    One addition or subtraction of small numbers: what a model of 135 M parameters can do. It
    writes the answer out and ends it with `#### <number>`; the number is compared.
    """
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    had = rng.randint(2, 12)
    gives = rng.random() < 0.5
    amount = rng.randint(1, had - 1 if gives else 9)
    has = had - amount if gives else had + amount
    verb, sign = ("gives away", "-") if gives else ("buys", "+")
    question = (
        f"{name} has {had} {thing}. {name} {verb} {amount} {thing}. "
        f"How many {thing} does {name} have now?"
    )
    return {"question": question, "answer": f"{had} {sign} {amount} = {has}\n#### {has}"}


def _by_rule(
    make: Callable[[random.Random], Item],
) -> Callable[[Sequence[Document], int], list[Item]]:
    """A generator that needs no text."""

    def items(_: Sequence[Document], seed: int) -> list[Item]:
        rng = random.Random(seed)
        return [make(rng) for _ in range(ITEMS)]

    return items


GENERATORS: dict[str, Callable[[Sequence[Document], int], list[Item]]] = {
    "continuation_choice": continuation_choice,
    "agreement": _by_rule(agreement),
    "addition": _by_rule(addition),
    "progression": _by_rule(progression),
    "repetition": _by_rule(repetition),
    "word_problems": _by_rule(word_problem),
}
CHOICES_OF = {name: CHOICES for name in GENERATORS if name != "word_problems"} | {"agreement": 2}


def write_builtin_tasks(
    names: Sequence[str], documents: Sequence[Document], seed: int, cache_dir: Path
) -> Path:
    """Write items and task YAML of built-in tasks; the same text and seed reuse the files.

    Returns:
        The folder, named after the text, the seed and the generators' version.
    """
    identity = digest([GENERATOR_VERSION, seed, [document.text for document in documents]])
    folder = cache_dir / "tasks" / identity[:16]
    for name in names:
        items = folder / f"{name}.jsonl"
        if not items.exists():
            lines = [json.dumps(item) for item in GENERATORS[name](documents, seed)]
            write_bytes_atomic(items, ("\n".join(lines) + "\n").encode())
        own = TEMPLATES / f"{name}.yaml"
        template = own if own.is_file() else TEMPLATES / "multiple_choice.yaml"
        task = yaml.safe_load(template.read_text())
        task["task"] = name
        task["dataset_kwargs"] = {
            "data_files": {"test": str(items)},
            "cache_dir": str(cache_dir / "datasets"),
        }
        write_bytes_atomic(folder / f"{name}.yaml", yaml.safe_dump(task).encode())
    return folder
