"""Compiling and keeping the C loops."""

from __future__ import annotations

import tempfile

import pytest

from methods.engine.ops.cpu import build
from methods.engine.ops.cpu.build import reason_without
from methods.engine.routed import routed
from methods.engine.routing import routing_of
from tests.methods.conftest import small_model
from tests.methods.engine.scripted import Scripted, all_sites, random_tables

pytestmark = pytest.mark.skipif(reason_without() is not None, reason="no C compiler")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    clear()
    yield
    monkeypatch.undo()
    clear()


def clear():
    build.library.cache_clear()
    build.reason_without.cache_clear()


def test_once_a_machine(tmp_path):
    build.library()
    (built,) = (tmp_path / "cache" / "routebench" / "loops").iterdir()
    stamp = built.stat().st_mtime_ns
    clear()
    build.library()
    assert built.stat().st_mtime_ns == stamp


def test_other_flags_make_another(monkeypatch, tmp_path):
    build.library()
    clear()
    monkeypatch.setenv("CFLAGS", "-O1 -DUNUSED='a b'")
    build.library()
    assert len(list((tmp_path / "cache" / "routebench" / "loops").iterdir())) == 2


def test_without_a_place_to_keep_it(monkeypatch, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert build.library().partition is not None
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_flags_that_are_none(monkeypatch):
    monkeypatch.setenv("CFLAGS", "'")
    assert "do not load" in build.reason_without()


def test_without_a_compiler_pytorch_runs(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    model = small_model()
    method = Scripted(random_tables(all_sites(model, "unit"), rows=1))
    with routed(model, method, "gathered"):
        assert not routing_of(model).ops.compiled
    wrong = pytest.raises(ValueError, match="kernels=compiled: no C compiler")
    with wrong, routed(model, method, "gathered", kernels="compiled"):
        pass


def test_a_compiler_that_fails(monkeypatch, tmp_path):
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho 'fatal: no OpenMP' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    assert "no OpenMP" in build.reason_without()
    folder = tmp_path / "cache" / "routebench" / "loops"
    assert list(folder.iterdir()) == []
