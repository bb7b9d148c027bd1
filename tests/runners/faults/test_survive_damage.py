"""Files that lost their end or a bit: noticed, said, and made again to the same numbers."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from runners.store.record import Record
from runners.store.run_folder import EventLog, RunFolder
from runners.store.stage_cache import StageCache
from runners.training.state import Checkpoint
from tests.conftest import SHRUNK, Commands
from tests.nursery import Nursery, Run, Step
from tests.runners.survival import RECIPE, events, leftovers, outcome
from tests.runners.toy import toy

STEPS = "{steps:40,batch_size:2,seq_len:32,accumulate:1}"
WORDS = (*SHRUNK, "tracking=off", *RECIPE, "sparsity=0.4", "checkpoint_seconds=0")
WORDS += (f"budget.routers={STEPS}", "eval.tasks=[agreement]")


@pytest.fixture(autouse=True)
def quick_writes(monkeypatch):
    """Thousands of small files; no power failure is tested."""
    monkeypatch.setattr("os.fsync", lambda file: None)


def cut(content: bytes, place: int) -> bytes:
    return content[:place]


def flip(content: bytes, place: int) -> bytes:
    changed = bytearray(content)
    changed[place] ^= 1 << (place % 8)
    return bytes(changed)


Damage = Callable[[bytes, int], bytes]


def damages(file: Path, step: int = 1) -> Iterator[None]:
    """The file with its end cut off at, and with a bit flipped in, every `step`-th byte."""
    whole = file.read_bytes()
    for place in range(0, len(whole.rstrip(b"\n")), step):
        for damage in (cut, flip):
            file.write_bytes(damage(whole, place))
            yield
    file.write_bytes(whole)


def test_any_byte_of_a_cached_value(tmp_path):
    cache, value = StageCache(tmp_path), {"nll": [1.25, -0.0625], "text": "a b", "none": None}
    cache.value("key", lambda: value)
    for _ in damages(tmp_path / "values" / "key.json"):
        assert cache.value("key", lambda: value) == (value, False)
    assert cache.value("key", dict) == (value, True)


def test_any_byte_of_a_stage_product(tmp_path, tiny_llama):
    """Every 23rd: the report, the names and shapes, the tensors."""
    cache, method, runs = StageCache(tmp_path), toy(tiny_llama), 0

    def work() -> dict:
        nonlocal runs
        runs += 1
        with torch.no_grad():
            method.vectors["1_mlp"].fill_(2.0)
        return {"name": "toy", "seconds": 1.5}

    cache.load_or_run("key", method, work)
    for _ in damages(cache.product("key"), 23):
        before = runs
        assert not cache.load_or_run("key", method, work)["cached"]
        assert runs == before + 1
    assert cache.load_or_run("key", method, work)["cached"]


def test_any_byte_of_a_record_and_its_items(tmp_path):
    """Of the record every seventh: its checksum is that of a cached value, above."""
    folder = RunFolder(tmp_path)
    folder.items_file.write_bytes(b"PAR1 items PAR1")
    record = Record("informed", "", "tiny", "sotu", seed=0, sparsity_target=0.3)
    for file, step in ((folder.result_file, 7), (folder.items_file, 1)):
        folder.complete(record)
        whole = folder.items_file.read_bytes()
        for _ in damages(file, step):
            folder.discard_damaged()
            assert not folder.is_complete()
            folder.items_file.write_bytes(whole)
            folder.complete(record)
        folder.discard_damaged()
        assert folder.is_complete()


def test_any_byte_of_the_timed_cases(tmp_path, caplog):
    folder, case = RunFolder(tmp_path), {"seq": 8, "ms": 1.5}
    timed = Record("m", "", "tiny", "sotu", 0, 0.5, evaluated=False)
    folder.add_speed("prefill", case, timed)
    for _ in damages(folder.speed_file):
        assert folder.speed() == {} and "timed again" in caplog.text
        caplog.clear()
    assert folder.speed()["prefill"] == [case]


def test_any_byte_of_a_checkpoint(tmp_path, caplog):
    saved, tensors = Checkpoint(tmp_path / "x.checkpoint"), {"a": torch.arange(3.0)}
    saved.save(tensors, {"curve": [0.1]})
    for _ in damages(tmp_path / "x.checkpoint"):
        assert saved.load() is None
        assert "is damaged" in caplog.text and "begins again" in caplog.text
        caplog.clear()
    found = saved.load()
    assert found is not None and found[1] == {"curve": [0.1]}
    assert torch.equal(found[0]["a"], tensors["a"])


@pytest.mark.parametrize("end", [b"", b'{"event": "step", "sta', b"\xff\x00"])
def test_a_torn_end_of_the_log(tmp_path, end):
    """Each step is there once, what is lacking is written again from the checkpoint."""
    log = EventLog(tmp_path / "log.jsonl")
    curve = [{"step": step, "loss": 0.5 * step} for step in (1, 2, 3)]
    log.append({"event": "stage", "name": "before"})
    for figures in curve[:2]:
        log.append({"event": "step", "stage": "s", **figures})
    log.path.write_bytes(log.path.read_bytes() + end)
    log.rewind("s", 3, curve)
    assert [event["step"] for event in events(tmp_path, "step")] == [1, 2, 3]
    assert [event["name"] for event in events(tmp_path, "stage")] == ["before"]
    log.rewind("s", 2, curve[:2])
    assert [event["step"] for event in events(tmp_path, "step")] == [1, 2]
    log.rewind("s", 3)
    assert events(tmp_path, "step") == [], "another point's log has the whole curve"


def words(folder: Path) -> list[str]:
    return [*WORDS, f"results_dir={folder / 'results'}", f"cache_dir={folder / 'cache'}"]


def at(folder: Path) -> Commands:
    return Commands(folder, folder / "results", folder / "cache")


@pytest.fixture(scope="module")
def calm(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calm")
    run = nursery.run(Step(words(folder)))
    assert run.code() == 0, run.said
    return folder


@pytest.fixture(scope="module")
def stopped(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Killed in the middle of a later gradient stage, with a checkpoint of it."""
    folder = tmp_path_factory.mktemp("stopped")
    (run,) = nursery.start(Step([*words(folder)]))
    while len(routers(folder)) < 20:
        assert run.running(), run.said
        time.sleep(0.005)
    run.kill()
    run.code()
    assert len(checkpoints(folder)) == 1
    return folder


def routers(folder: Path) -> list[dict]:
    return [
        e
        for f in folder.glob("results/*")
        for e in events(f, "step")
        if e["stage"].startswith("train")
    ]


def checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("cache/stages/*.checkpoint"))


def again(nursery: Nursery, folder: Path, calm: Path) -> Run:
    run = nursery.run(Step(words(folder)))
    assert run.code() == 0, run.said
    assert outcome(at(folder)) == outcome(at(calm))
    assert leftovers(folder / "cache") == []
    return run


def damage(file: Path, how: Damage, share: float = 0.5) -> None:
    """At a share of its content; a newline at the end is none, and its loss no damage."""
    whole = file.read_bytes()
    file.write_bytes(how(whole, int(share * (len(whole.rstrip(b"\n")) - 1))))


@pytest.mark.parametrize("how", [pytest.param(cut, marks=pytest.mark.slow), flip])
def test_every_file_of_a_finished_run(nursery, calm, tmp_path, how):
    shutil.copytree(calm, tmp_path, dirs_exist_ok=True)
    damaged = [*tmp_path.glob("results/*/result.json"), *tmp_path.glob("cache/values/*.json")]
    damaged += [*tmp_path.glob("cache/stages/*.safetensors")]
    assert len(damaged) >= 5
    for file in damaged:
        damage(file, how)
    run = again(nursery, tmp_path, calm)
    for file in damaged:
        assert str(file) in run.said


@pytest.mark.slow
def test_checkpoint_and_log_of_a_killed_run(nursery, calm, stopped, tmp_path):
    """The stage begins again."""
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    (file,) = checkpoints(tmp_path)
    damage(file, cut)
    (log,) = tmp_path.glob("results/*/log.jsonl")
    damage(log, cut, 0.8)
    run = again(nursery, tmp_path, calm)
    assert f"{file} is damaged" in run.said and "the stage begins again" in run.said
    assert "goes on after step" not in run.said


@pytest.mark.slow
def test_each_file_at_many_places(nursery, calm, stopped, tmp_path):
    """One damaged file a run: cut and flipped at five places each."""
    patterns = {
        calm: ("results/*/result.json", "results/*/items.parquet", "cache/values/*.json"),
        stopped: ("cache/stages/*.checkpoint", "cache/stages/*.safetensors"),
    }
    cases = [
        (start, found.relative_to(start), how, share)
        for start, globs in patterns.items()
        for pattern in globs
        for found in sorted(start.glob(pattern))
        for how in (cut, flip)
        for share in (0.0, 0.3, 0.6, 0.9, 1.0)
    ]
    for number, (start, name, how, share) in enumerate(cases):
        folder = tmp_path / str(number)
        shutil.copytree(start, folder)
        if start == calm and name.parts[0] == "cache":
            for record in folder.glob("results/*/result.json"):
                record.unlink()  # a complete point asks the cache for nothing
        damage(folder / name, how, share)
        run = again(nursery, folder, calm)
        assert name.name in run.said, (name, how, share, run.said)
        shutil.rmtree(folder)
    print(f"{len(cases)} damaged files")
