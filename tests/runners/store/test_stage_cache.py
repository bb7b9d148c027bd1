"""The cache of stage cache: content keys, whole or absent, made once."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import torch

from runners.errors import UserError
from runners.store.files import read_checked
from runners.store.stage_cache import StageCache, content_key
from tests.conftest import ROOT
from tests.runners.toy import toy


@pytest.fixture
def cache(tmp_path):
    return StageCache(tmp_path / "cache")


class Work:
    """A stage that writes a number into the method and counts its runs."""

    def __init__(self, method, number=2.0):
        self.method, self.number, self.runs = method, number, 0

    def __call__(self):
        self.runs += 1
        with torch.no_grad():
            self.method.vectors["1_mlp"].fill_(self.number)
        return {"name": "toy", "seconds": 1.5, "cached": False}


def test_content_key_depends_on_content_only():
    assert content_key("a", {"x": 1, "y": 2}) == content_key("a", {"y": 2, "x": 1})
    keys = {content_key("a", value) for value in (None, 0.3, 0.5, "0.5", {"x": 0.5}, ["0.5"])}
    assert len(keys) == 6


def test_a_product_is_made_once_and_loaded_into_another_method(cache, tiny_llama):
    made, loaded = Work(toy(tiny_llama)), Work(toy(tiny_llama))
    first = cache.load_or_run("key", made.method, made)
    second = cache.load_or_run("key", loaded.method, loaded)
    assert (made.runs, loaded.runs) == (1, 0)
    assert (first["cached"], second["cached"]) == (False, True)
    assert {**second, "cached": False} == first
    expected = made.method.state_dict()
    for name, value in loaded.method.state_dict().items():
        assert torch.equal(value, expected[name])
    cache.load_or_run("other", loaded.method, loaded)
    assert loaded.runs == 1


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize(
    "damage",
    [truncate, flip, empty, lambda path: path.write_text("{}"), lambda path: path.unlink()],
)
def test_a_damaged_product_is_made_again(cache, tiny_llama, damage):
    work = Work(toy(tiny_llama))
    cache.load_or_run("key", work.method, work)
    damage(cache.product("key"))
    fresh = Work(toy(tiny_llama), number=5.0)
    assert cache.load_or_run("key", fresh.method, fresh)["cached"] is False
    assert fresh.runs == 1
    last = Work(toy(tiny_llama))
    assert cache.load_or_run("key", last.method, last)["cached"] is True
    assert last.method.vectors["1_mlp"][0].item() == 5.0


def test_a_failed_stage_leaves_no_product(cache, tiny_llama):
    method = toy(tiny_llama)
    with pytest.raises(ZeroDivisionError):
        cache.load_or_run("key", method, lambda: 1 / 0)
    work = Work(method)
    assert cache.load_or_run("key", method, work)["cached"] is False


def test_a_product_of_another_method_is_made_again(cache, tiny_llama):
    work, other = Work(toy(tiny_llama)), Work(toy(tiny_llama))
    cache.load_or_run("key", work.method, work)
    other.method.weights.pop("1_mlp")
    assert cache.load_or_run("key", other.method, other)["cached"] is False


def test_what_a_killed_writer_left_is_removed(cache, tiny_llama):
    work = Work(toy(tiny_llama))
    cache.stages.mkdir(parents=True)
    (cache.stages / ".key.safetensors.12345678.tmp").write_bytes(b"half")
    cache.checkpoint("key").write_bytes(b"whole")
    cache.load_or_run("key", work.method, work)
    assert [path.suffix for path in sorted(cache.stages.iterdir())] == [".safetensors", ".lock"]


def test_files_follow_the_umask(cache, tiny_llama):
    work = Work(toy(tiny_llama))
    before = os.umask(0o027)
    try:
        cache.load_or_run("key", work.method, work)
    finally:
        os.umask(before)
    assert cache.product("key").stat().st_mode & 0o777 == 0o640


def test_values(cache):
    calls = []

    def make():
        calls.append(1)
        return {"value": 1.5}

    assert cache.value("key", make) == ({"value": 1.5}, False)
    assert cache.value("key", make) == ({"value": 1.5}, True)
    (cache.values / "key.json").write_text('{"value": 1')
    assert cache.value("key", make) == ({"value": 1.5}, False)
    assert len(calls) == 2


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match="choose another folder"):
        StageCache(tmp_path / "cache").value("key", dict)


TWO = """
import sys, time, pathlib
sys.path.insert(0, {root!r})
from runners.store.stage_cache import StageCache
folder = pathlib.Path(sys.argv[1])
def make():
    with (folder / "calls").open("a") as calls:
        calls.write("x")
    time.sleep(1.0)
    return {{"value": 3}}
(folder / f"ready{{sys.argv[2]}}").touch()
while not (folder / "go").exists():
    time.sleep(0.01)
print(StageCache(folder).value("key", make)[0])
"""


def test_two_processes_make_it_once(tmp_path):
    code = TWO.format(root=str(ROOT))
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path), str(i)], stdout=subprocess.PIPE, text=True
        )
        for i in range(2)
    ]
    while not all((tmp_path / f"ready{i}").exists() for i in range(2)):
        assert all(process.poll() is None for process in pair)
        time.sleep(0.02)
    (tmp_path / "go").touch()
    assert [process.communicate(timeout=60)[0].strip() for process in pair] == ["{'value': 3}"] * 2
    assert (tmp_path / "calls").read_text() == "x"
    assert read_checked(tmp_path / "values" / "key.json") == {"value": 3}
