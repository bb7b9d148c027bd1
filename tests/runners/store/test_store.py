"""Run folders: named by content, whole or absent, retried or skipped as they should be."""

from __future__ import annotations

import errno
import json
import os
import select
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from runners.errors import UserError
from runners.point_config import fingerprint
from runners.store.files import full_disk, to_json, write_bytes_atomic, write_json_atomic
from runners.store.record import Record
from runners.store.redact import is_secret, redact, redact_text
from runners.store.run_folder import RunFolder
from runners.store.stage_cache import StageCache
from tests.conftest import ROOT, compose_tiny

RECORD = Record("informed", "", "tiny", "sotu", seed=0, sparsity_target=0.3)
CONFIG = compose_tiny("method=informed", "sparsity=0.3")


def leaves(value, path=()):
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    else:
        yield path


def changed(config, path, value):
    copy = json.loads(json.dumps(config))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return copy


OUTPUTS = {"results_dir", "cache_dir", "tracking", "force", "hydra", "speed"}
OUTPUTS |= {"retry_failed", "checkpoint_seconds", "device_map", "max_memory", "report"}
OUTPUTS |= {"tune"}  # a trial of a search has no record


@pytest.mark.parametrize("path", list(leaves(CONFIG)), ids=".".join)
def test_fingerprint_depends_on_all_but_outputs(path):
    other = fingerprint(changed(CONFIG, path, "something else"))
    added_later = path[:2] == ("eval", "generation")
    assert (other == fingerprint(CONFIG)) == (path[0] in OUTPUTS or added_later)


def test_fingerprint_form():
    assert fingerprint({"a": 1, "b": 2.0}) == fingerprint({"b": 2, "a": 1.0})
    assert fingerprint({"a": 1}) != fingerprint({"a": True})
    assert fingerprint({"a": 0.3}) != fingerprint({"a": "0.3"})
    assert len(fingerprint(CONFIG)) == 16
    assert int(fingerprint(CONFIG), 16) >= 0


@pytest.mark.parametrize("key", ["token", "hf_token", "apiKey", "WANDB_API_KEY", "password"])
def test_secret_keys(key):
    assert is_secret(key)
    assert "s3cret" not in json.dumps(redact({"a": [{key: "s3cret"}]}))
    assert fingerprint({key: "one"}) == fingerprint({key: "two"})


@pytest.mark.parametrize("key", ["tokens", "fit_tokens", "eos_token", "keyboard", "num_fewshot"])
def test_keys_that_are_no_secrets(key):
    assert not is_secret(key)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("https://me:s3cret@host/x", "https://<redacted>@host/x"),
        ("cannot open https://s3cret@host/x today", "cannot open https://<redacted>@host/x today"),
        ("http://h/x?a=1&hf_token=s3cret&b=2", "http://h/x?a=1&hf_token=<redacted>&b=2"),
        ("https://host/a@b?tokens=3", "https://host/a@b?tokens=3"),
        ("someone@host", "someone@host"),
    ],
)
def test_urls(text, clean):
    assert redact_text(text) == clean
    assert redact({"x": [text]}) == {"x": [clean]}


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)  # fmt: skip


@given(PLAIN)
def test_plain_values_stay_what_they_are(value):
    assert to_json(value, "x") == value


def test_scalars_become_numbers():
    scalars = {"a": np.float32(0.5), "b": torch.tensor(3), "c": (np.int64(2),)}
    assert json.dumps(to_json(scalars, "x")) == '{"a": 0.5, "b": 3, "c": [2]}'


@pytest.mark.parametrize("value", [float("nan"), float("inf"), torch.zeros(2), {1, 2}, b"x"])
def test_what_json_cannot_hold_is_named(value):
    with pytest.raises(ValueError, match=r"record\.deep\[1\]"):
        to_json({"deep": [0, value]}, "record")


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_keeps_the_old_file(tmp_path, monkeypatch, call):
    path = tmp_path / "x.json"
    write_json_atomic(path, {"old": 1})
    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(UserError, match=r"no space left to write .*x\.json"):
            write_json_atomic(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_full_disk_is_seen_in_safetensors_errors_too():
    class SafetensorError(Exception):
        pass

    text = "Error while serializing: I/O error: No space left on device (os error 28)"
    assert "no space left" in str(full_disk(ROOT, SafetensorError(text)))
    assert "no space left" in str(full_disk(ROOT, OSError(errno.ENOSPC, "full")))
    assert full_disk(ROOT, ValueError("another")) is None
    assert full_disk(ROOT, OSError(errno.EACCES, "no")) is None


def test_unwritable_folder_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="choose another folder"):
        write_bytes_atomic(tmp_path / "file" / "x", b"")
    with (
        pytest.raises(UserError, match="choose another folder"),
        RunFolder(tmp_path / "file").lock(),
    ):
        pass


@pytest.fixture
def folder(tmp_path):
    run = RunFolder(tmp_path / "point")
    run.path.mkdir()
    return run


def test_life_of_a_complete_point(folder):
    folder.begin(CONFIG)
    assert yaml.safe_load(folder.config_file.read_text()) == CONFIG
    assert json.loads(folder.status_file.read_text())["state"] == "running"
    assert not folder.is_complete()
    folder.log({"event": "step", "loss": 1.5})
    folder.log({"event": "stage"})
    assert [json.loads(s)["event"] for s in folder.log_file.read_text().splitlines()] == [
        "step",
        "stage",
    ]
    folder.complete(RECORD)
    assert folder.is_complete()
    assert folder.result() == RECORD.to_json()
    assert {"schema_version": 1, "status": "complete"}.items() <= folder.result().items()
    assert json.loads(folder.status_file.read_text())["state"] == "complete"


def test_a_failed_point_keeps_its_reason_and_is_not_complete(folder):
    folder.begin(CONFIG)
    folder.fail(replace(RECORD, status="failed", reason="why"))
    record = folder.result()
    assert (record["status"], record["reason"], record["method"]) == ("failed", "why", "informed")
    assert not folder.is_complete()
    assert folder.failed() == "why"
    folder.log({"event": "old"})
    folder.begin(CONFIG)
    assert folder.result() is None
    assert folder.failed() is None
    assert "old" in folder.log_file.read_text()
    folder.complete(RECORD)
    folder.begin(CONFIG)
    assert not folder.log_file.exists()


@pytest.mark.parametrize("text", ["", '{"status": "comp', "[]", '{"status": "complete"}', "\xff"])
def test_a_torn_or_foreign_record_is_not_complete(folder, text):
    folder.result_file.write_text(text, encoding="latin-1")
    assert not folder.is_complete()


def test_a_file_system_without_locks_is_one_line(folder, tmp_path, monkeypatch):
    """As NFS without its lock daemon answers."""

    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(UserError, match=r"cannot lock .*No locks available.*results_dir="):
        folder.lock().__enter__()
    with pytest.raises(UserError, match=r"cannot lock .*No locks available.*cache_dir="):
        StageCache(tmp_path).value("key", dict)


HOLD = """
import sys; sys.path.insert(0, {root!r})
from pathlib import Path
from runners.store.run_folder import RunFolder
with RunFolder(Path(sys.argv[1])).lock():
    print("held", flush=True); sys.stdin.readline()
"""


def is_said_within(process, seconds):
    return bool(select.select([process.stdout], [], [], seconds)[0])


def test_a_second_process_waits(folder):
    command = [sys.executable, "-c", HOLD.format(root=str(ROOT)), str(folder.path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    first, second = None, None
    try:
        first = subprocess.Popen(command, **pipes)
        assert is_said_within(first, 20)
        second = subprocess.Popen(command, **pipes)
        assert not is_said_within(second, 2)
        first.communicate(b"\n", timeout=20)
        assert is_said_within(second, 20)
        second.communicate(b"\n", timeout=20)
    finally:
        for process in (first, second):
            if process is not None:
                process.kill()
                process.wait()


def test_a_timed_case_takes_the_place_of_one_that_was_timed_alike_alone(folder):
    folder.begin({"seed": 0})
    case = {"seq": 512, "batch": 1, "decisions": "real", "threads": 2, "speedup": 1.2}
    drawn = {**case, "decisions": "random", "speedup": 1.4}
    for found in (case, drawn, {**case, "threads": 1}, {**case, "speedup": 1.3}):
        folder.add_speed("prefill", found, RECORD)
    folder.complete(RECORD)
    kept = folder.result()["speed"]["prefill"]
    assert [(c["decisions"], c["threads"], c["speedup"]) for c in kept] == [
        ("random", 2, 1.4),
        ("real", 1, 1.2),
        ("real", 2, 1.3),
    ]
