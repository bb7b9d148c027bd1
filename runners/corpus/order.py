"""One order of the rows of many shards, from the shards' names and a seed alone.

Every process that reads gets the same rows, on whatever machine: no worker has a part of its own.
Rows are read when they are asked for, and only the shuffle buffer is held.
"""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

OPEN = 16
"""Shards that are read in turn, a row of each."""
PARTS = 20
"""A split without shards of its own gets one of so many of train's rows."""
PLACES = {"calibration": 1, "test": 2}
"""Which: the second and the third, so that a file of three rows serves all splits."""

Row = tuple[str, str]
"""Name and text of a document."""


@dataclass(frozen=True)
class Shard:
    """A file, or a part of a data set, that can be read by itself.

    Attributes:
        name: begins the names of its documents.
        texts: opens it.
    """

    name: str
    texts: Callable[[], Iterator[str]]


def stream(
    shards: Sequence[Shard],
    *,
    split: str | None = None,
    shared: Sequence[str] = (),
    seed: int | None = None,
    buffer: int = 0,
) -> Iterator[Row]:
    """Rows of several shards in turn, so that no text is that of one shard only.

    Args:
        shards: sorted by name.
        split, shared: only the part of `split`, of text that also serves the splits `shared`.
        seed: of the order of the shards, of which `OPEN` are read at a time, and of the buffer;
            None keeps the order of the names and rows.
        buffer: rows among which the next one is drawn; 0 as without a seed.
    """
    numbered = list(enumerate(shards))
    own = {name: PLACES[name] for name in shared}
    if seed is None or buffer == 0:
        return _in_turn([_rows(shard, index, split, own) for index, shard in numbered])
    random.Random(f"shards {seed}").shuffle(numbered)
    rows = _in_turn([_rows(shard, index, split, own) for index, shard in numbered])
    return _drawn(rows, buffer, random.Random(f"rows {seed}"))


def _rows(shard: Shard, index: int, split: str | None, own: Mapping[str, int]) -> Iterator[Row]:
    """A shard's rows of a split. Its place in the list shifts the count, for shards of few rows."""
    for number, text in enumerate(shard.texts()):
        place = (index + number) % PARTS
        owner = next((name for name, taken in own.items() if place == taken), "train")
        if split is None or owner == split:
            yield f"{shard.name}-{number + 1}", text


def _in_turn(shards: Iterable[Iterator[Row]]) -> Iterator[Row]:
    """A row of each of `OPEN` shards; one that has ended makes room for the next."""
    waiting = iter(shards)
    opened = deque(itertools.islice(waiting, OPEN))
    while opened:
        shard = opened.popleft()
        row = next(shard, None)
        if row is not None:
            yield row
            opened.append(shard)
        else:
            opened.extend(itertools.islice(waiting, 1))


def _drawn(rows: Iterator[Row], size: int, drawn: random.Random) -> Iterator[Row]:
    """Each row is drawn from a buffer, where the next one takes its place."""
    held = list(itertools.islice(rows, size))
    for row in rows:
        place = drawn.randrange(size)
        held[place], taken = row, held[place]
        yield taken
    drawn.shuffle(held)
    yield from held
