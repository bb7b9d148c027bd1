"""Real W&B in offline mode: one run per point, closed whatever happens."""

from __future__ import annotations

import subprocess
import sys

import pytest

from runners.tracking import NoTracker, WandbTracker, flat, open_tracker
from tests.conftest import ROOT
from tests.runners.wandb_file import runs

IDENTITY = {"method": "informed", "variant": "", "sparsity_target": 0.3, "seed": 2}
RECORD = {"sparsity_realised": 0.31, "perplexity": {"sotu": {"value": 4.5, "per_document": [1]}}}


@pytest.fixture
def config(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    tracking = {"backend": "wandb", "mode": "offline", "project": "p", "entity": None}
    where = {"group": "a-sweep", "dir": str(tmp_path / "wandb-folder")}
    return {"tracking": {**tracking, **where}, "sparsity": 0.3, "hf_token": "s3cret"}


def test_one_run_per_point_also_after_an_exception(config, tmp_path):
    folders = [tmp_path / name for name in ("first", "second")]
    with open_tracker(config, folders[0], **IDENTITY) as tracker:
        assert isinstance(tracker, WandbTracker)
        for step in (1, 2):
            tracker.log({"routers/step": step, "routers/loss": 1.0 / step})
        tracker.summary(RECORD)
    with pytest.raises(ZeroDivisionError), open_tracker(config, folders[1], **IDENTITY) as tracker:
        tracker.log({"routers/step": 1, "routers/loss": 9.0})
        raise ZeroDivisionError
    import wandb

    assert wandb.run is None
    found = {run["config"]["fingerprint"]: run for run in runs(config["tracking"]["dir"])}
    assert set(found) == {"first", "second"}
    first = found["first"]
    assert (first["group"], first["name"], first["job"]) == (
        "a-sweep",
        "informed-0.3-s2",
        "informed",
    )
    assert first["config"]["sparsity"] == 0.3
    assert [row["routers/loss"] for row in first["history"]] == [1.0, 0.5]
    assert first["summary"]["perplexity/sotu/value"] == 4.5
    assert first["exit"] == 0
    assert found["second"]["exit"] == 1
    assert [row["routers/loss"] for row in found["second"]["history"]] == [9.0]
    everything = b"".join(f.read_bytes() for f in tmp_path.rglob("*") if f.is_file())
    assert b"s3cret" not in everything


def test_off_does_not_import_wandb(tmp_path):
    code = (
        "import sys; from pathlib import Path; from runners.tracking import open_tracker\n"
        "with open_tracker({'tracking': {'backend': 'off'}}, Path('x')) as t:\n"
        "    t.log({'a': 1.0}); t.summary({}); print(type(t).__name__, 'wandb' in sys.modules)"
    )
    command = [sys.executable, "-c", code]
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "NoTracker False\n"
    assert list(tmp_path.iterdir()) == []


class Broken:
    def __init__(self):
        self.calls = 0

    def log(self, *_, **__):
        self.calls += 1
        raise ConnectionError("service is gone")


def test_a_failing_service_stops_tracking_only(caplog):
    tracker = WandbTracker(Broken())
    for _ in range(3):
        tracker.log({"loss": 1.0})
    tracker.summary(RECORD)
    tracker.close(failed=False)
    assert tracker.run.calls == 1
    assert [r.message for r in caplog.records] == [
        "tracking stopped, the run goes on: service is gone"
    ]


def test_a_service_that_does_not_start_is_a_warning(config, tmp_path, caplog):
    (tmp_path / "file").touch()
    config["tracking"]["dir"] = str(tmp_path / "file")
    with open_tracker(config, tmp_path / "point", **IDENTITY) as tracker:
        assert isinstance(tracker, NoTracker)
    assert "no tracking for this point" in caplog.text


def test_flat():
    assert flat({**RECORD, "deep": {"a": {"b": True}}, "none": None}) == {
        "sparsity_realised": 0.31,
        "perplexity/sotu/value": 4.5,
        "deep/a/b": True,
        "none": None,
    }
