"""The service of a tracker fails in every way; the run goes on and nothing is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.runners.tracked import KEY, opened, tracking_config
from tests.runners.wandb_file import read_run, runs
from tests.runners.wandb_server import Server

POINT = """
import json, sys
from pathlib import Path
from tests.runners.tracked import opened
with opened(json.loads(sys.argv[1]), Path("point")) as tracker:
    tracker.log({"routers/step": 1, "routers/loss": 1.0})
    print("started", flush=True)
    sys.stdin.readline()
    for step in range(2, 300):
        tracker.log({"routers/step": step, "routers/loss": 1.0})
print("ended", flush=True)
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    return tracking_config(tmp_path, monkeypatch)


@pytest.fixture
def started(config, tmp_path):
    """Starts a point in a process of its own and returns it in the middle."""
    processes = []

    def start(**environment: str) -> subprocess.Popen[str]:
        words = [sys.executable, "-c", POINT, json.dumps(config)]
        env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(words, cwd=tmp_path, env=env, text=True, **pipes)
        processes.append(process)
        assert process.stdout is not None and process.stdout.readline() == "started\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def server():
    running = Server()
    yield running
    running.close()


def test_the_death_of_its_process_does_not_stop_a_run(started):
    """wandb-core, through which all goes, is killed in the middle."""
    run = started()
    for child in children(run.pid):
        os.kill(child, signal.SIGKILL)
    out, err = run.communicate("\n", timeout=60)
    assert (run.returncode, out) == (0, "ended\n"), err


def test_an_outage_in_the_middle_does_not_stall_a_run(started, server, config, tmp_path):
    """The service answers when the run starts and never again."""
    config["tracking"] |= {"mode": "online", "entity": "me", "finish_timeout_s": 2}
    run = started(WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY)
    assert any("UpsertBucket" in sent["query"] for sent in server.queries)
    server.silent.set()
    out, err = run.communicate("\n", timeout=60)
    assert (run.returncode, out) == (0, "ended\n"), err
    assert "Upload it later: wandb sync" in err
    files = [f for f in tmp_path.rglob("*") if f.is_file()]
    assert not any(KEY.encode() in file.read_bytes() for file in files)
    (kept,) = (f for f in files if f.suffix == ".wandb")
    assert len(read_run(kept)["history"]) == 299


@pytest.mark.parametrize("inherited", [False, True])
def test_an_unreachable_service_leaves_an_offline_run(
    started, config, tmp_path, monkeypatch, inherited
):
    """Also where the parent's W&B service is inherited, which keeps the id of the first try."""
    if inherited:
        other = tracking_config(tmp_path / "parent", monkeypatch)
        with opened(other, tmp_path / "parent-point") as tracker:
            assert tracker.active
        assert "WANDB_SERVICE" in os.environ
    else:
        monkeypatch.delenv("WANDB_SERVICE", raising=False)
    config["tracking"] |= {"mode": "online", "entity": "me", "init_timeout_s": 3}
    run = started(WANDB_BASE_URL="http://127.0.0.1:9", WANDB_API_KEY=KEY)
    out, err = run.communicate("\n", timeout=60)
    assert (run.returncode, out) == (0, "ended\n"), err
    assert "tried again offline" in err
    tracked = runs(config["tracking"]["dir"])
    assert [len(found["history"]) for found in tracked] == [299]


def test_offline_runs_are_uploaded_by_the_documented_command(config, server, tmp_path):
    with opened(config, tmp_path / "point") as tracker:
        tracker.log({"routers/step": 1, "routers/loss": 0.75})
    folders = (tmp_path / "wandb-folder" / "wandb").glob("offline-run-*")
    environment = {**os.environ, "WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}
    command = [sys.executable, "-m", "wandb", "sync", *map(str, folders)]
    options = {"capture_output": True, "text": True, "timeout": 60}
    done = subprocess.run(command, cwd=tmp_path, env=environment, **options)
    assert done.returncode == 0, done.stderr
    sent = next(s["variables"] for s in server.queries if "UpsertBucket" in s["query"])
    assert sent["groupName"] == "a-sweep" and sent["tags"] == ["informed", "tiny", "sotu", "mine"]
    assert any('"routers/loss":0.75' in line.replace(" ", "") for line in server.streamed)


def children(parent: int) -> list[int]:
    """Processes whose parent is this one."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True)
    return [int(word) for word in listed.stdout.split()]
