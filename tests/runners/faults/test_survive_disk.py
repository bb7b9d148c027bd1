"""A disk that is really full: one line, nothing half-written, and the same command completes."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pandas as pd
import pytest
from safetensors import safe_open

from tests.conftest import ROOT, SHRUNK, Commands
from tests.nursery import Nursery, Run, Step
from tests.runners.survival import RECIPE, leftovers, outcome

WORDS = (*SHRUNK, "tracking=off", *RECIPE, "sparsity=0.4", "checkpoint_seconds=0")
WORDS += ("eval.tasks=[agreement]",)


@cache
def can_mount() -> bool:
    """In a process of its own: it leaves its name spaces."""
    code = "from tests.nursery import can_mount; import sys; sys.exit(not can_mount())"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def words(folder: Path, *more: str) -> list[str]:
    return [*WORDS, f"results_dir={folder / 'results'}", f"cache_dir={folder / 'cache'}", *more]


def at(folder: Path) -> Commands:
    return Commands(folder, folder / "results", folder / "cache")


@pytest.fixture(scope="module")
def calm(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("calm")
    run = nursery.run(Step(words(folder)))
    assert run.code() == 0, run.said
    return outcome(at(folder))


def check_whole(folder: Path) -> None:
    """Every file under a final name can be read to its end."""
    for file in folder.rglob("*"):
        if file.name.startswith(".") or file.suffix == ".tmp" or not file.is_file():
            continue
        if file.suffix == ".json":
            json.loads(file.read_bytes())
        elif file.suffix in (".safetensors", ".checkpoint"):
            with safe_open(str(file), "pt") as opened:
                assert [opened.get_tensor(name) for name in opened.keys()]  # noqa: SIM118
        elif file.suffix == ".parquet":
            pd.read_parquet(file)
    for file in folder.glob("results/*/result.json"):
        assert json.loads(file.read_bytes())["status"] == "failed"


def check_refusal(run: Run) -> None:
    assert run.code() == 1, run.said
    assert len(run.errors) == 1, run.said
    assert "no space left to write" in run.errors[0]
    assert "Traceback" not in run.said, run.said


def fill(nursery: Nursery, calm: dict, mount: Path, kib: int) -> bool:
    """Whether a disk of this size was too small."""
    mount.mkdir()
    steps = [Step(words(mount), disk=size) for size in (f"{kib}k", "256m")]
    full, after = nursery.start(*steps, mount=mount)
    too_small = full.code() != 0
    if too_small:
        check_refusal(full)
        check_whole(full.folder / "disk")
    assert after.code() == 0, after.said
    assert outcome(at(after.folder / "disk")) == calm
    assert leftovers(after.folder / "disk" / "cache") == []
    return too_small


needs_mounts = pytest.mark.skipif(
    not can_mount(), reason="a process may not have mounts of its own here"
)


@needs_mounts
@pytest.mark.parametrize("kib", [0, 300])
@pytest.mark.slow
def test_a_full_disk(nursery, calm, tmp_path, kib):
    """Without any room (a page is the least), and with room for some stages."""
    assert fill(nursery, calm, tmp_path / "mount", kib or 4)


@needs_mounts
@pytest.mark.slow
def test_a_disk_that_is_full_at_every_moment(nursery, calm, tmp_path):
    """From nothing to enough in steps of some pages."""
    sizes = range(8, 4096, 28)
    for number, kib in enumerate(sizes):
        if not fill(nursery, calm, tmp_path / f"mount{number}", kib):
            break
    assert number > 10
    print(f"{number} sizes up to {kib} KiB were too small")


@pytest.mark.parametrize("file_bytes", [1000, 25_000])
@pytest.mark.slow
def test_files_that_may_not_grow(nursery, calm, tmp_path, file_bytes):
    """RLIMIT_FSIZE: EFBIG in the middle of a write."""
    first = nursery.run(Step(words(tmp_path), file_bytes=file_bytes))
    check_refusal(first)
    check_whole(tmp_path)
    second = nursery.run(Step(words(tmp_path)))
    assert second.code() == 0, second.said
    assert outcome(at(tmp_path)) == calm


@needs_mounts
@pytest.mark.slow
def test_a_tracker_without_a_disk_does_not_stop_a_run(nursery, calm, tmp_path):
    mount = tmp_path / "mount"
    mount.mkdir()
    track = ("tracking=wandb", f"tracking.dir={mount}", "tracking.mode=offline")
    places = [f"results_dir={tmp_path / 'results'}", f"cache_dir={tmp_path / 'cache'}"]
    kept = [word for word in WORDS if word != "tracking=off"]
    (run,) = nursery.start(Step([*kept, *places, *track], disk="16k"), mount=mount)
    assert run.code() == 0, run.said
    assert outcome(at(tmp_path)) == calm
