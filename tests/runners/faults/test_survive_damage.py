"""Files that lost their end or a bit: noticed, said, and made again to the same numbers."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from runners.store.event_log import EventLog
from runners.store.run_folder import RunFolder
from runners.store.seal import Damaged, read_sealed
from runners.store.stage_cache import Products
from runners.training.checkpoints import Checkpoints
from tests.conftest import SHRUNK, Commands
from tests.runners.nursery import Nursery, Run, Step
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
    products, value = Products(tmp_path), {"nll": [1.25, -0.0625], "text": "a b", "none": None}
    products.value("key", lambda: value)
    for _ in damages(tmp_path / "values" / "key.json"):
        assert products.value("key", lambda: value) == (value, False)
    assert products.value("key", dict) == (value, True)


def test_any_byte_of_a_stage_product(tmp_path, tiny_llama):
    """Every byte of the report, every 101st of the tensors."""
    products, method, runs = Products(tmp_path), toy(tiny_llama), 0

    def work() -> dict:
        nonlocal runs
        runs += 1
        with torch.no_grad():
            method.vectors["1_mlp"].fill_(2.0)
        return {"name": "toy", "seconds": 1.5}

    products.stage("key", method, work)
    for name, step in (("report.json", 1), ("method.safetensors", 101)):
        for _ in damages(tmp_path / "stages" / "key" / name, step):
            before = runs
            assert not products.stage("key", method, work)["cached"]
            assert runs == before + 1
    assert products.stage("key", method, work)["cached"]


def test_any_byte_of_a_record_and_its_items(tmp_path):
    folder = RunFolder(tmp_path)
    folder.items_file.write_bytes(b"PAR1 items PAR1")
    record = {"perplexity": {"sotu": {"value": 20.25}}, "reason": None}
    for file in (folder.result_file, folder.items_file):
        folder.complete(record)
        whole = folder.items_file.read_bytes()
        for _ in damages(file):
            folder.discard_damaged()
            assert not folder.is_complete()
            folder.items_file.write_bytes(whole)
            folder.complete(record)
        folder.discard_damaged()
        assert folder.is_complete()


def test_any_byte_of_a_checkpoint(tmp_path, caplog):
    saved = Checkpoints(tmp_path, 0.0)
    for step in (1, 2):
        saved.save(step, {"a": torch.arange(3.0) + step}, {"curve": [step]})
    last = max(tmp_path.iterdir())
    for _ in damages(last):
        found = saved.load()
        assert found is not None and (found.step, found.state) == (1, {"curve": [1]})
        assert "damaged and left out" in caplog.text
        caplog.clear()
    found = saved.load()
    assert found is not None and found.step == 2


def test_any_byte_of_the_log(tmp_path):
    """What a damaged line said is written again from the checkpoint; each step is there once."""
    log = EventLog(tmp_path / "log.jsonl")
    curve = [{"step": step, "loss": 0.5 * step} for step in (1, 2, 3)]
    log.append({"event": "stage", "name": "before"})
    for figures in curve:
        log.append({"event": "step", "stage": "s", **figures})
    for _ in damages(log.path):
        log.go_back("s", 3, curve)
        assert [event["step"] for event in events(tmp_path, "step")] == [1, 2, 3]
    log.go_back("s", 2, curve[:2])
    assert [event["step"] for event in events(tmp_path, "step")] == [1, 2]
    assert log.has_curve("s", 2) and not log.has_curve("s", 3)


def test_a_seal_is_of_the_whole_content(tmp_path):
    """An older version's file has none; one whose seal is damaged is no such file."""
    (tmp_path / "x").write_text('{"a": 1}')
    assert read_sealed(tmp_path / "x", strict=False) == {"a": 1}
    with pytest.raises(Damaged):
        read_sealed(tmp_path / "x")


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
    """Killed in the middle of a later gradient stage, with two checkpoints of it."""
    folder = tmp_path_factory.mktemp("stopped")
    (run,) = nursery.start(Step([*words(folder)]))
    while len(routers(folder)) < 20:
        assert run.running(), run.said
        time.sleep(0.005)
    run.kill()
    run.code()
    assert len(checkpoints(folder)) == 2
    return folder


def routers(folder: Path) -> list[dict]:
    return [
        e
        for f in folder.glob("results/*")
        for e in events(f, "step")
        if e["stage"].startswith("train")
    ]


def checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("cache/stages/*/checkpoints/*.safetensors"))


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
    damaged += [*tmp_path.glob("cache/stages/*/*.safetensors")]
    assert len(damaged) >= 5
    for file in damaged:
        damage(file, how)
    run = again(nursery, tmp_path, calm)
    for file in damaged:
        assert str(file) in run.said


@pytest.mark.slow
@pytest.mark.parametrize("files", [1, 2])
def test_checkpoints_and_log_of_a_killed_run(nursery, calm, stopped, tmp_path, files):
    """The one before is gone on from; where there is none, the stage begins again."""
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    for file in checkpoints(tmp_path)[-files:]:
        damage(file, cut)
    (log,) = tmp_path.glob("results/*/log.jsonl")
    damage(log, flip if files == 1 else cut, 0.8)
    run = again(nursery, tmp_path, calm)
    assert run.said.count("a checkpoint is damaged and left out") == files
    assert ("goes on after step" in run.said) == (files == 1)


@pytest.mark.slow
def test_each_file_at_many_places(nursery, calm, stopped, tmp_path):
    """One damaged file a run: cut and flipped at five places each."""
    patterns = {
        calm: ("results/*/result.json", "results/*/items.parquet", "cache/values/*.json"),
        stopped: ("cache/stages/*/checkpoints/*", "cache/stages/*/report.json"),
    }
    cases = [
        (start, found.relative_to(start), how, share)
        for start, globs in patterns.items()
        for pattern in globs
        for found in sorted(start.glob(pattern))
        for how in (cut, flip)
        for share in (0.0, 0.3, 0.6, 0.9, 1.0)
    ]
    spare = checkpoints(stopped)[0].name  # not opened while the newer one is whole
    for number, (start, name, how, share) in enumerate(cases):
        folder = tmp_path / str(number)
        shutil.copytree(start, folder)
        if start == calm and name.parts[0] == "cache":
            for record in folder.glob("results/*/result.json"):
                record.unlink()  # a complete point asks the cache for nothing
        damage(folder / name, how, share)
        run = again(nursery, folder, calm)
        assert (name.name in run.said) == (name.name != spare), (name, how, share, run.said)
        shutil.rmtree(folder)
    print(f"{len(cases)} damaged files")
