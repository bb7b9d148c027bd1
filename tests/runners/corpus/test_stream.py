"""One order for every reader, from several shards, of which no more is read than is asked for."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections import Counter

import pytest

from runners.corpus.source import OPEN, PARTS, stream
from tests.conftest import ROOT

SPLITS = ("train", "calibration", "test")
SHARED = ("calibration", "test")


def shards(*sizes):
    def texts(name, size):
        return lambda: (f"{name} row {number}" for number in range(size))

    return [(f"s{i:02}", texts(f"s{i:02}", size)) for i, size in enumerate(sizes)]


def of(document):
    return document.name.split("-")[0]


@pytest.mark.parametrize("sizes", [(100,), (60, 40), (1, 98, 1), (3,) * 40])
@pytest.mark.parametrize("seed", [0, 1])
def test_splits_share_all_rows_and_no_row(sizes, seed):
    found = {
        split: list(stream(shards(*sizes), split=split, shared=SHARED, seed=seed, buffer=7))
        for split in SPLITS
    }
    rows = list(itertools.chain(*found.values()))
    assert Counter(rows) == Counter(stream(shards(*sizes)))
    assert len(rows) == len(set(rows)) == sum(sizes)
    other = stream(shards(*sizes), split="test", shared=SHARED, seed=seed + 1, buffer=7)
    assert set(other) == set(found["test"]), "a seed moves no row to another split"
    for split in SHARED:
        assert abs(len(found[split]) - sum(sizes) / PARTS) <= 1


def test_the_beginning_is_of_many_shards_and_of_another_order_for_another_seed():
    sizes = (1000,) * 10
    first = list(itertools.islice(stream(shards(*sizes), seed=3, buffer=100), 50))
    assert len({of(row) for row in first}) == 10
    assert first == list(itertools.islice(stream(shards(*sizes), seed=3, buffer=100), 50))
    other = list(itertools.islice(stream(shards(*sizes), seed=4, buffer=100), 50))
    assert first != other
    numbers = [int(document.name.split("-")[1]) for document in first]
    assert numbers != sorted(numbers), "rows of a shard are drawn, not read off"


def test_without_a_seed_it_is_the_order_of_names_in_turn():
    found = [document.name for document in stream(shards(2, 1, 3))]
    assert found == ["s00-1", "s01-1", "s02-1", "s00-2", "s02-2", "s02-3"]
    assert found == [d.name for d in stream(shards(2, 1, 3), seed=5, buffer=0)]


def test_no_more_is_read_than_is_asked_for():
    """The shards never end; a reader that took one whole would not either."""
    read = Counter()

    def endless(name):
        for number in itertools.count():
            read[name] += 1
            yield f"{name} {number}"

    many = [(f"s{i}", lambda i=i: endless(f"s{i}")) for i in range(100)]
    assert len(list(itertools.islice(stream(many, seed=0, buffer=32), 200))) == 200
    assert sum(read.values()) <= 200 + 32 + 1
    assert len(read) == OPEN


PROGRAM = """
import hashlib, itertools, random
from runners.corpus.source import stream
random.seed()
shards = [(f"s{i}", lambda i=i: (f"{i} {n}" for n in range(50))) for i in range(20)]
rows = itertools.islice(stream(shards, split="train", shared=["test"], seed=7, buffer=30), 300)
print(hashlib.sha256(repr([(row.name, row.text) for row in rows]).encode()).hexdigest())
"""


def test_every_process_reads_the_same():
    """Also one of another machine: the digest is what it was on the first."""
    found = set()
    for salt in ("1", "2"):
        env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": salt, "RANK": salt}
        done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True)
        found.add(done.stdout.decode().strip())
    assert found == {"d7649c96097019c2ee3583ef80591da840041719c4767c59536f62e963935c73"}
