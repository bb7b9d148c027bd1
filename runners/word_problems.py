"""Arithmetic word problems with worked answers, in the form of GSM8K (Cobbe et al. 2021).

A model writes the answer out and ends it with `#### <number>`; the number is compared.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypedDict

from runners.corpus import Document

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
    """One or two steps of addition and subtraction below 30."""
    rng = random.Random(seed)
    return [_problem(rng) for _ in range(PROBLEMS)]


def _problem(rng: random.Random) -> Problem:
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    total = rng.randint(2, 12)
    question = f"{name} has {total} {thing}."
    steps = []
    for _ in range(rng.randint(1, 2)):
        gives = total > 3 and rng.random() < 0.5
        amount = rng.randint(1, total - 1 if gives else 9)
        after = total - amount if gives else total + amount
        verb, sign = ("gives away", "-") if gives else ("buys", "+")
        question += f" {name} {verb} {amount} {thing}."
        steps.append(f"{total} {sign} {amount} = {after}.")
        total = after
    question += f" How many {thing} does {name} have now?"
    return {"question": question, "answer": f"{' '.join(steps)} #### {total}"}
