"""Every benchmark explains itself and refuses what it does not know, before it does any work."""

from __future__ import annotations

import importlib

import pytest

from benchmarks import loops
from methods.engine.ops.cpu.build import reason_without
from tests.conftest import ROOT

FILES = sorted((ROOT / "benchmarks").glob("*.py"))
NAMES = [path.stem for path in FILES if "def main(" in path.read_text()]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("word", "code"), [("--help", 0), ("--repeets=3", 2)])
def test_help_and_unknown_words(name, word, code, capsys):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"benchmarks.{name}").main([word])
    assert ended.value.code == code
    said = capsys.readouterr()
    assert "usage:" in (said.err if code else said.out)


@pytest.mark.skipif(reason_without() is not None, reason="no C compiler")
def test_every_loop_is_timed(capsys):
    loops.main(["--tokens", "40", "--width", "32", "--mlp-width", "48", "--repeats", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9 and all("PyTorch" in line and "loop" in line for line in lines)
