"""Real W&B in offline mode: one run per point, closed whatever happens; TensorBoard; off."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from runners.errors import UserError
from runners.launching.check import check_tracking
from runners.options import parse_section
from runners.point_config import TrackingConfig
from runners.tracking.base import Files, Safe, curves, flat
from runners.tracking.mirror import mirror, mirror_speed, summary_of
from tests.conftest import ROOT
from tests.runners.tracked import IDENTITY, opened, tracking_config
from tests.runners.wandb_file import runs

RECORD = {
    **IDENTITY,
    "sparsity_realised": 0.31,
    "perplexity": {"sotu": {"value": 4.5, "low": 4.0, "high": 5.0, "dense": 3.0, "documents": 2}},
    "accuracy": {"piqa": {"value": 0.6, "metric": "acc_norm", "stderr": 0.1, "dense": 0.7}},
    "realised": {"per_layer": [{"layer": i, "attention": 0.2, "mlp": 0.4} for i in range(3)]},
    "stages": [
        {"name": "routers", "seconds": 2.0, "steps": 4, "tokens": 64, "peak_memory_bytes": 9}
        | {"final_loss": None, "cached": False, "figures": {}}
    ],
    "identity": {"fingerprint": "first", "weights_sha256": "abc"},
}


@pytest.fixture
def config(tmp_path, monkeypatch):
    return tracking_config(tmp_path, monkeypatch)


@pytest.fixture
def board(config, tmp_path):
    config["tracking"] |= {"backend": "tensorboard", "dir": str(tmp_path / "board")}
    return config


def write_point(folder) -> None:
    (folder / "routed").mkdir(parents=True)
    (folder / "routed" / "routed.json").write_text("{}")
    (folder / "result.json").write_text("{}")


def test_one_run_per_point_also_after_an_exception(config, tmp_path):
    folders = [tmp_path / name for name in ("first", "second")]
    with opened(config, folders[0]) as tracker:
        assert tracker.active
        for step in (1, 2):
            tracker.log({"routers/step": step, "routers/loss": 1.0 / step})
        tracker.summary(summary_of(RECORD))
    with (
        pytest.raises(ZeroDivisionError),
        opened(config, folders[1], job="train") as tracker,
    ):
        tracker.log({"routers/step": 1, "routers/loss": 9.0})
        raise ZeroDivisionError
    import wandb

    assert wandb.run is None
    found = {run["config"]["fingerprint"]: run for run in runs(config["tracking"]["dir"])}
    assert set(found) == {"first", "second"}
    first = found["first"]
    assert (first["group"], first["name"], first["job"]) == ("a-sweep", "informed-0.3-s2", "sweep")
    assert first["tags"] == ["informed", "tiny", "sotu", "mine"]
    assert first["config"]["sparsity"] == 0.3
    assert [row["routers/loss"] for row in first["history"]] == [1.0, 0.5]
    assert first["summary"]["perplexity/sotu/value"] == 4.5
    assert "method" not in first["summary"]
    assert first["exit"] == 0
    assert (found["second"]["exit"], found["second"]["job"]) == (1, "train")
    assert [row["routers/loss"] for row in found["second"]["history"]] == [9.0]
    everything = b"".join(f.read_bytes() for f in tmp_path.rglob("*") if f.is_file())
    assert b"s3cret" not in everything


def test_a_point_that_failed_resumes_its_run_and_a_finished_one_does_not(config, tmp_path):
    for failing in (True, False, False):
        try:
            with opened(config, tmp_path / "point") as tracker:
                tracker.log({"routers/step": 1})
                if failing:
                    raise ZeroDivisionError
        except ZeroDivisionError:
            time.sleep(1.1)  # the folders of one id are told apart by the second
    ids = [run["id"] for run in runs(config["tracking"]["dir"])]
    assert len(ids) == 3
    assert sorted(ids.count(name) for name in set(ids)) == [1, 2] and ids[0] == ids[1]
    assert json.loads((tmp_path / "point" / "tracking.json").read_text()) == {"quality": ids[2]}


def test_speed_joins_the_run_that_has_the_points_quality(config, tmp_path):
    """Timed later, by another command: scalars of the same run, which stays one of its sweep."""
    cases = [{"batch": b, "seq": 8, "speedup": 1 + b / 10, "parts": {}} for b in (1, 2)]
    with opened(config, tmp_path / "point") as tracker:
        mirror(tracker, tmp_path / "point", RECORD)
    time.sleep(1.1)
    with opened(config, tmp_path / "point", job="speed") as tracker:
        mirror_speed(tracker, {"prefill": cases, "decode": []})
        assert tracker.active
    quality, speed = runs(config["tracking"]["dir"])
    assert (speed["id"], speed["job"]) == (quality["id"], "sweep")
    assert quality["summary"]["perplexity_ratio"] == 1.5
    assert speed["summary"]["speedup_prefill"] == 1.2
    assert speed["summary"]["speed/prefill_1x8/speedup"] == 1.1


def test_a_curve_for_each_target():
    figures = {"step": 3, "loss": 0.5, "sparsity": 0.2, "target": 0.25, "lr": 0.1}
    apart = curves("routers", figures, apart=True)
    assert apart == {
        "routers/step": 3,
        "routers/loss_at_0_25": 0.5,
        "routers/sparsity_at_0_25": 0.2,
        "routers/lr": 0.1,
    }
    assert curves("routers", figures, apart=False) == {
        f"routers/{k}": v for k, v in figures.items()
    }


def test_media_and_lineage(config, tmp_path):
    folder = tmp_path / "first"
    write_point(folder)
    with opened(config, folder) as tracker:
        mirror(tracker, folder, RECORD)
        case = {"seq": 8, "batch": 1, "speedup": 1.2, "parts": {}}
        mirror_speed(tracker, {"prefill": [case]})
        assert tracker.active
    (run,) = runs(config["tracking"]["dir"])
    logged = {key: value for row in run["history"] for key, value in row.items()}
    for name, rows in {"results": 2, "stages": 1, "sparsity_by_layer": 3}.items():
        assert (logged[f"{name}/_type"], logged[f"{name}/nrows"]) == ("table-file", rows)
    assert logged["speed_prefill/ncols"] == 3
    assert logged["routing/_type"] == "image-file"
    found = run["artifacts"]
    made = {name: a for name, a in found.items() if not a["input"] and a["kind"] != "run_table"}
    assert {a["kind"] for a in made.values()} == {"routed_model", "record"}
    model = made["routed-informed-first"]
    assert model["files"] == ["routed.json"]
    assert model["metadata"]["inputs"]["base_model"] == {"name": "tiny", "weights_sha256": "abc"}
    assert {a["kind"] for a in found.values() if a["input"]} == {"base_model", "dataset"}


def test_off_does_not_import_wandb(tmp_path):
    code = (
        "import sys; from pathlib import Path; from tests.runners.tracked import opened\n"
        "with opened({'tracking': {'backend': 'off'}}, Path('x')) as t:\n"
        "    t.log({'a': 1.0}); t.summary({}); print(t.active, 'wandb' in sys.modules)"
    )
    command = [sys.executable, "-c", code]
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "False False\n"
    assert list(tmp_path.iterdir()) == []


class Broken:
    def __init__(self):
        self.calls = 0

    def log(self, *_):
        self.calls += 1
        raise ConnectionError("service is gone")

    def close(self, *, failed):
        raise ConnectionError("still gone")


def test_a_failing_service_stops_tracking_only(caplog, tmp_path):
    broken = Broken()
    tracker = Safe(broken)
    for _ in range(3):
        tracker.log({"loss": 1.0})
    mirror(tracker, tmp_path, RECORD)
    tracker.close(failed=False)
    assert broken.calls == 1
    assert [r.message for r in caplog.records] == [
        "tracking stopped, the run goes on: service is gone"
    ]


def test_a_service_that_does_not_start_is_a_warning(config, tmp_path, caplog):
    (tmp_path / "file").touch()
    config["tracking"]["dir"] = str(tmp_path / "file")
    with opened(config, tmp_path / "point") as tracker:
        assert not tracker.active
    assert "no tracking for this point" in caplog.text


def test_tensorboard_holds_curves_tables_and_pictures(board, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "first"
    write_point(folder)
    with opened(board, folder) as tracker:
        for step in (1, 2):
            tracker.log({"routers/step": step, "routers/loss": 1.0 / step})
        mirror(tracker, folder, RECORD)
        assert tracker.active
    events = EventAccumulator(str(tmp_path / "board" / "a-sweep" / "first-sweep"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("routers/loss")] == [(1, 1.0), (2, 0.5)]
    assert events.Scalars("result/perplexity/sotu/value")[0].value == 4.5
    assert "routing" in events.Tags()["images"]
    tensors = {name: events.Tensors(name)[0].tensor_proto for name in events.Tags()["tensors"]}
    assert b"| perplexity | sotu | 4.5 |" in tensors["results/text_summary"].string_val[0]
    lineage = tensors["routed_model/routed-informed-first/text_summary"].string_val[0]
    assert b'"weights_sha256": "abc"' in lineage
    everything = b"".join(f.read_bytes() for f in (tmp_path / "board").rglob("*") if f.is_file())
    assert b"s3cret" not in everything


def test_mistakes_are_found_before_anything_runs(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match="WANDB_API_KEY"):
        check_tracking(TrackingConfig("wandb", "online"))
    with pytest.raises(UserError, match="mode must be one of offline, online"):
        parse_section(TrackingConfig, {"backend": "wandb", "mode": "sometimes"})
    with pytest.raises(UserError, match="backend must be one of off, wandb, tensorboard"):
        parse_section(TrackingConfig, {"backend": "csv"})
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password s3cret\n")
    (tmp_path / ".netrc").chmod(0o600)
    check_tracking(TrackingConfig("wandb", "online"))
    check_tracking(TrackingConfig("wandb", "offline"))


def test_flat():
    assert flat({"a": 1, "list": [1], "deep": {"a": {"b": True}}, "none": None}) == {
        "a": 1,
        "deep/a/b": True,
        "none": None,
    }


def test_files_need_no_inputs(config, tmp_path):
    (tmp_path / "a.json").write_text("{}")
    with opened(config, tmp_path / "point") as tracker:
        tracker.attempt(lambda t: t.files(Files("thing", "a b/c", [tmp_path / "a.json"])))
        assert tracker.active
    (run,) = runs(config["tracking"]["dir"])
    assert run["artifacts"]["a_b_c"]["files"] == ["a.json"]
