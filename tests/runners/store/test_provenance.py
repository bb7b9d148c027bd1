"""Provenance changes with what it names, and with nothing else."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest
import torch

from methods.engine.checkpoint import hash_model
from runners.base_model.synthetic import tiny_model
from runners.store.provenance import (
    code_version,
    git_state,
    provenance,
    stage_version,
)
from tests.conftest import ROOT


def test_is_json_and_has_no_environment(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "s3cret-wandb")
    monkeypatch.setenv("HF_TOKEN", "s3cret-hub")
    text = json.dumps(provenance())
    assert "s3cret" not in text
    assert json.loads(text)["packages"]["torch"] == torch.__version__


def git(folder, *words):
    identity = ("-c", "user.name=t", "-c", "user.email=t@t")
    command = ["git", "-C", str(folder), *identity, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_git_state(tmp_path):
    assert git_state(tmp_path) == {"commit": None, "dirty": None}
    git(tmp_path, "init", "-q")
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-qm", "first")
    assert git_state(tmp_path) == {"commit": git(tmp_path, "rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "a").write_text("2")
    assert git_state(tmp_path)["dirty"] is True
    (tmp_path / "inside").mkdir()
    assert git_state(tmp_path / "inside") == {"commit": None, "dirty": None}


def test_model_hash():
    model, _ = tiny_model(seed=0)
    same, other = tiny_model(seed=0)[0], tiny_model(seed=1)[0]
    assert hash_model(model) == hash_model(same)
    assert hash_model(model) != hash_model(other)
    assert hash_model(model) != hash_model(same.to(torch.bfloat16))
    weight = model.model.layers[2].mlp.up_proj.weight
    before = hash_model(model)
    weight.data[3, 4] += 1e-3
    assert hash_model(model) != before


def test_code_version(tmp_path):
    def package(name, text):
        folder = tmp_path / name / "code"
        folder.mkdir(parents=True)
        (folder / "a.py").write_bytes(text)
        (folder / "notes.txt").write_text(name)
        return folder

    base = code_version(package("one", b"x = 1\n"))
    assert code_version(package("two", b"x = 1\n")) == base
    assert code_version(package("windows", b"x = 1\r\n")) == base
    changed = package("three", b"x = 2\n")
    assert code_version(changed) != base
    assert code_version(changed / "a.py") != code_version(tmp_path / "two" / "code" / "a.py")
    (tmp_path / "two" / "code" / "b.py").touch()
    assert code_version(tmp_path / "two" / "code") != base
    with pytest.raises(FileNotFoundError):
        code_version(tmp_path / "absent")


@pytest.fixture
def clone(tmp_path):
    """The code that stages depend on, in another place."""
    for name in ("methods", "runners/training"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    return tmp_path


def versions(root):
    files = {name: root / "methods" / f"{name}.py" for name in ("informed", "mod", "skipgpt")}
    return {name: stage_version(f"methods.{name}", file, root) for name, file in files.items()}


def touched(root, name):
    """Methods whose stages are made anew after a line was added to a file."""
    before = versions(root)
    file = root / name
    file.write_text(file.read_text() + "\n")
    return {method for method, version in versions(root).items() if version != before[method]}


def test_a_methods_stages_depend_on_its_own_code(clone):
    every = set(versions(clone))
    assert versions(clone) == versions(ROOT), "where the code lies does not count"
    assert touched(clone, "methods/mod.py") == {"mod"}
    assert touched(clone, "methods/informed.py") == {"informed"}
    assert touched(clone, "methods/greedy.py") == set()
    assert "skipgpt" in touched(clone, "methods/parts/gates.py")
    for shared in ("methods/base.py", "methods/types.py", "runners/training/loop.py"):
        assert touched(clone, shared) == every
    loops = next((clone / "methods" / "engine").rglob("*.c")).relative_to(clone)
    assert touched(clone, loops) == touched(clone, "methods/engine/routed.py") == every


def test_a_foreign_methods_stages_depend_on_its_neighbours(clone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mine")
    own, helper, part = folder / "norm.py", folder / "helper.py", clone / "methods/parts/gates.py"
    own.write_text("import torch\nfrom helper import scale\nfrom methods.parts import gates\n")
    for file in (helper, folder / "other.py"):
        file.write_text("scale = 1\n")
    seen = [stage_version("norm", own, clone)]
    for file in (helper, part, own, folder / "other.py"):
        file.write_text(file.read_text() + "\n")
        seen.append(stage_version("norm", own, clone))
    assert len(set(seen)) == 4 and seen[-1] == seen[-2]
