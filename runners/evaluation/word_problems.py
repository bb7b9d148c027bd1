"""Arithmetic word problems with worked answers, in the form of GSM8K (Cobbe et al. 2021).

A model writes the answer out and ends it with `#### <number>`; the number is compared.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypedDict

from runners.corpus.source import Document

PROBLEMS = 1024
NAMES = (
    "Anna Ben Carl Dora Emma Fred George Helen Ivan Jack Kate Laura Mark Nancy Oscar Paul Rose "
    "Sarah Tom Victor"
).split()
THINGS = "apples books coins cards shells stamps eggs pens".split()


class Problem(TypedDict):
    """One question with the fields of the hub's gsm8k."""

    question: str
    answer: str


def word_problems(documents: Sequence[Document], seed: int) -> list[Problem]:
    """One addition or subtraction of small numbers: what a model of 135 M parameters can do."""
    rng = random.Random(seed)
    return [_problem(rng) for _ in range(PROBLEMS)]


def _problem(rng: random.Random) -> Problem:
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
