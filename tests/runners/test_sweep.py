"""The command line end to end on the tiny model: `runners/sweep.py`, `train.py`, `score.py`."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path

import pytest

from runners import job
from runners.runtime import workers
from tests.conftest import Commands, Finished
from tests.runners.survival import numbers
from tests.runners.wandb_file import runs

KEYS = {
    "schema_version",
    "method",
    "model",
    "data",
    "seed",
    "status",
    "sparsity_target",
    "sparsity_realised",
    "flops_ratio",
    "perplexity",
    "accuracy",
    "stages",
}
RECIPE = ("method=informed", "method.rank=4")
TIMED = (
    "speed=sweep",
    "speed.prefill={tokens:[24],batch_sizes:[1]}",
    "speed.decode={context:[16],batch_sizes:[1],steps:3}",
    "speed.repeats=2",
)


def records(commands: Commands) -> dict[float, dict]:
    found = [json.loads(file.read_text()) for file in commands.results.glob("*/result.json")]
    return {record["sparsity_target"]: record for record in found}


def test_sweep_records_tracks_and_is_skipped_when_repeated(shell, tmp_path):
    words = (*RECIPE, *TIMED, "sparsity=0.3,0.5", "eval.tasks=[agreement]", "-m")
    words = ("budget.routers.steps=4", *words)  # one for each target of informed
    tracking = ("tracking=wandb", f"tracking.dir={tmp_path / 'track'}")
    secrets = {"WANDB_API_KEY": "s3cret" * 6 + "abcd", "HF_TOKEN": "hf_s3cret"}
    url = ("+data.revision='https://me:s3cret@host/x?token=s3cret'",)
    shrunk = [w for w in shell.line("sweep")[2:] if w not in ("tracking=off", "report=false")]
    done = shell.run("sweep", *shrunk, *words, *tracking, *url, shrink=False, **secrets)
    assert done.code == 0, done.stdout + done.stderr
    found = records(shell)
    assert set(found) == {0.3, 0.5}
    for target, record in found.items():
        assert set(record) >= KEYS
        identity = {key: record[key] for key in ("status", "method", "model", "data", "seed")}
        assert list(identity.values()) == ["complete", "informed", "tiny", "sotu", 0]
        assert set(record["perplexity"]["sotu"]) >= {"value", "low", "high", "dense"}
        assert set(record["accuracy"]["agreement"]) >= {"value", "stderr", "dense", "n"}
        entry = record["perplexity"]["sotu"]
        assert entry["low"] <= entry["value"] <= entry["high"]
        assert record["accuracy"]["agreement"]["n"] == 8
        stage = {"name", "seconds", "tokens", "steps", "peak_memory_bytes", "cached"}
        assert all(set(s) >= stage for s in record["stages"])
        assert record["realised"]["calibration"] == pytest.approx(target, abs=0.01)
        assert record["flops_ratio"] > 0
    hits = {t: [s["cached"] for s in r["stages"]] for t, r in found.items()}
    assert not any(hits[0.3])
    assert hits[0.5] == [*[True] * (len(hits[0.5]) - 1), False]
    check_tracking(tmp_path / "track", found)
    check_console(done, found, shell.results)
    stored = b"".join(f.read_bytes() for f in shell.results.rglob("*") if f.is_file())
    assert b"s3cret" not in stored
    assert b"<redacted>" in stored

    kept = [*shell.results.glob("*/result.json"), shell.results / "report.html"]
    before = {file: file.stat().st_mtime_ns for file in kept}
    again = shell.run("sweep", *shrunk, *words, *tracking, *url, shrink=False)
    assert again.code == 0
    assert (again.stdout + again.stderr).count("skipped (force=true computes it again)") == 2
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert again.seconds < 10


def test_what_a_point_generates_is_added_to_a_record_without_it(commands):
    """Under the same fingerprint, from what was saved; nothing else of the record changes."""
    words = (*RECIPE, "sparsity=0.3")
    assert commands.run("sweep", *words, "eval.generation=null").code == 0
    (before,) = records(commands).values()
    assert "generation" not in before
    again = commands.run("sweep", *words)
    assert again.code == 0
    assert "stage" not in again.stdout
    (after,) = records(commands).values()
    added = after.pop("generation")
    hashes = (before.pop("content_sha256"), after.pop("content_sha256"))
    assert after == before
    assert hashes[0] != hashes[1]
    assert (added["kept"]["n"], added["settings"]["new_tokens"]) == (3, 4)
    assert added["kept"]["value"] == pytest.approx(sum(added["kept"]["per_prompt"]) / 3, abs=1e-5)
    assert [entry["prompt"] for entry in added["gallery"]] == ["In peace"]
    assert commands.run("sweep", *words, "force=true").code == 0
    assert records(commands)[0.3]["generation"] == added
    third = commands.run("sweep", *words)
    assert "adding" not in third.stdout
    other = commands.run("sweep", *words, "eval.generation.new_tokens=2")
    assert "adding" in other.stdout
    assert records(commands)[0.3]["generation"]["settings"]["new_tokens"] == 2


def check_console(done: Finished, found: dict[float, dict], results: Path) -> None:
    """A log: each stage once, points counted, no bar; at the end a table and two files."""
    said = done.stdout
    # W&B asks git about the folder that a command runs in, here none of git's
    assert {line for line in done.error_lines if not line.startswith("fatal: not a git ")} == set()
    assert "\r" not in said and "it/s" not in said
    assert "point 1 of 2: informed sparsity=0.3" in said
    assert re.search(r"point 2 of 2, about \d\d:\d\d left: informed sparsity=0.5", said)
    assert said.count("stage calibrate: ") == len(found)
    assert said.count("stage forecasters: ") == said.count("from the cache: forecasters") == 1
    assert said.count("evaluated the dense model") == 1
    assert said.count("INFO prefill 1 x 24: ") == said.count("INFO decode 1 x 16: ") == len(found)
    _, *lines = said[said.index("the sweep's 2 points;") :].splitlines()
    for (target, record), line in zip(sorted(found.items()), lines[1:3], strict=True):
        words = [f"{target:g}", f"{record['sparsity_realised']:.3f}"]
        words.append(f"{record['perplexity']['sotu']['value']:.2f}")
        words.append(f"x{record['speed']['decode'][0]['speedup']:.2f}")
        assert all(word in line for word in words), line
    files = [Path(line.partition(": ")[2]) for line in lines[3:]]
    assert [file.suffix for file in files] == [".png", ".html"]
    assert all(file.is_file() and file.is_relative_to(results) for file in files)


def check_tracking(folder: Path, found: dict[float, dict]) -> None:
    tracked = runs(folder)
    assert len(tracked) == 2
    assert len({run["group"] for run in tracked}) == 1
    assert tracked[0]["group"]
    for run in tracked:
        record = found[run["config"]["sparsity"]]
        assert run["config"]["fingerprint"] == record["identity"]["fingerprint"]
        assert run["summary"]["sparsity_realised"] == record["sparsity_realised"]
        assert run["summary"]["perplexity/sotu/value"] == record["perplexity"]["sotu"]["value"]
        assert run["exit"] == 0
        check_scalars(run["summary"], record)
        curves = {key for row in run["history"] for key in row}
        if not record["stages"][-2]["cached"]:
            stage = record["stages"][-2]["name"]
            assert {f"{stage}/lr", f"{stage}/gradient_norm_at_0_5", f"{stage}/step"} <= curves
            assert f"{stage}/loss_at_0_5" in curves and f"{stage}/loss" not in curves


def check_scalars(summary: dict, record: dict) -> None:
    """Quality and speed in one run, and what its configuration says not once more."""
    entry = record["perplexity"]["sotu"]
    assert summary["perplexity_ratio"] == pytest.approx(entry["value"] / entry["dense"])
    assert summary["flops_ratio"] == record["flops_ratio"]
    for phase, name in (("prefill", "1x24"), ("decode", "1x16")):
        (case,) = record["speed"][phase]
        assert summary[f"speedup_{phase}"] == case["speedup"]
        assert summary[f"speed/{phase}_{name}/routed_tps"] == case["routed_tps"]
    repeated = ("method", "seed", "sparsity_target", "options/rank", "identity/fingerprint")
    assert not set(repeated) & set(summary)


def test_a_folder_of_ones_own_text(commands):
    """Plain text as it lies there, by the short form; the same words again find it complete."""
    folder = commands.folder / "text"
    folder.mkdir()
    for number in range(80):
        (folder / f"{number:02}.txt").write_text(f"the {number} people of this union " * 8)
    words = ("data=./text", "method=random", "sparsity=0.3")
    assert commands.run("sweep", *words).code == 0
    (record,) = records(commands).values()
    assert (record["status"], record["data"]) == ("complete", "files")
    assert record["perplexity"]["files"]["value"] > 1
    assert "skipped" in commands.run("sweep", *words).stdout
    (folder / "00.txt").write_text("other words")
    assert commands.run("sweep", *words).code == 0
    assert len(list(commands.results.glob("*/result.json"))) == 2


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("sparsity=1.2",), "sparsity"),
        (("method=nope",), "nope"),
        (("model=./missing",), "./missing"),
        (("data=files", "data.dir=/nope"), "/nope"),
        (("eval.tasks=[no_such_task]",), "no_such_task"),
        (("mode=fastest",), "fastest"),
        (("sparsty=0.5",), "sparsty"),
        (("sparsity=0.3,1.2", "-m"), "1.2"),
        (("budget.routers.steps=0",), "budget.routers.steps"),
    ],
)
def test_bad_input_is_one_quick_line(commands, words, named):
    done = commands.run("sweep", "model=tiny", "tracking=off", *words, shrink=False)
    assert done.code == 2
    assert len(done.error_lines) == 1, done.stderr
    assert done.error_lines[0].startswith("error: ")
    assert named in done.error_lines[0]
    assert done.stdout == ""
    assert list(commands.folder.iterdir()) == []


def test_bad_input_is_quick(shell):
    assert shell.run("sweep", "sparsity=1.2", shrink=False).code == 2
    assert shell.run("sweep", "method=nope", shrink=False).seconds < 10


@pytest.mark.parametrize("key", ["results_dir", pytest.param("cache_dir", marks=pytest.mark.slow)])
def test_a_folder_that_cannot_be_written_is_one_line(commands, tmp_path, key):
    (tmp_path / "file").touch()
    done = commands.run("sweep", "method=random", f"{key}={tmp_path / 'file'}")
    assert done.code == 2
    assert len(done.error_lines) == 1, done.stderr
    assert f"cannot write {key}=" in done.stderr and "choose another folder" in done.stderr


@pytest.fixture
def failed(monkeypatch):
    reasons: list[str] = []
    monkeypatch.setattr(workers, "failed_points", reasons)
    return reasons


def test_force_computes_again(tiny_config, failed):
    from omegaconf import OmegaConf

    def stamp():
        return next(Path(cfg.results_dir).glob("*/result.json")).stat().st_mtime_ns

    cfg = OmegaConf.create(tiny_config("method=random"))
    job.run_point(cfg, "sweep")
    first = stamp()
    job.run_point(cfg, "sweep")
    assert stamp() == first
    job.run_point(OmegaConf.merge(cfg, {"force": True}), "sweep")
    assert stamp() > first
    assert not failed


def test_a_route_that_returns_scores_is_one_line(tiny_config, failed):
    from omegaconf import OmegaConf

    config = tiny_config("sparsity=0.1")
    config["method"] = {"name": "bare", "_target_": "tests.runners.toy.Bare"}
    job.run_point(OmegaConf.create(config), "sweep")
    (said,) = failed
    assert said.endswith("Bare at 1_mlp: route() gave a Tensor: return self.decide(scores_BT)")


def wait_for(condition, process, seconds=90):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["stage", "evaluation"])
def test_killed_and_restarted_gives_the_same_numbers(tmp_path, moment):
    """Killed in the middle of training (after some stages), or with one point complete."""
    steps = "budget.routers={steps:40,batch_size:2,seq_len:32,accumulate:1}"
    words = (*RECIPE, steps, "sparsity=0.3,0.5", "-m")
    undisturbed = Commands(tmp_path, tmp_path / "a", tmp_path / "cache-a")
    assert undisturbed.run("sweep", *words).code == 0
    killed = Commands(tmp_path, tmp_path / "b", tmp_path / "cache-b")
    process = killed.start("sweep", *words)

    def reached():
        if moment == "evaluation":
            return len(list(killed.results.glob("*/config.yaml"))) == 2
        logs = [file.read_text() for file in killed.results.glob("*/log.jsonl")]
        return any('"event": "step"' in text for text in logs)

    wait_for(reached, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(records(killed)) == (1 if moment == "evaluation" else 0)
    assert killed.run("sweep", *words).code == 0
    assert numbers(records(killed)) == numbers(records(undisturbed))
    assert len(records(killed)) == 2


def test_train_then_score_equals_sweep(commands, tmp_path):
    words = (*RECIPE, "sparsity=0.4")
    assert commands.run("train", *words).code == 0
    assert records(commands) == {}
    saved = next(commands.results.glob("*/routed"))
    assert {file.suffix for file in saved.iterdir()} == {".json", ".safetensors"}
    scored = Commands(tmp_path, tmp_path / "scored", commands.cache, commands.nursery)
    done = scored.run("score", f"saved={saved}")
    assert done.code == 0, done.stdout + done.stderr
    assert commands.run("sweep", *words).code == 0
    whole, alone = numbers(records(commands)[0.4]), numbers(records(scored)[0.4])
    assert alone.pop("stages") == []
    assert whole.pop("stages")
    assert alone == whole

    moved = scored.run("score", f"saved={saved}", "sparsity=0.2")
    assert moved.code == 0
    assert records(scored)[0.2]["realised"]["calibration"] == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize("words", [("saved=/nope",), ("saved=/nope", "sparsity=0.3"), ()])
def test_score_without_a_saved_model_is_one_line(commands, words):
    done = commands.run("score", "tracking=off", *words, shrink=False)
    assert done.code == 2
    assert len(done.error_lines) == 1
    assert "saved" in done.error_lines[0]
