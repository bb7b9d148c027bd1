"""The benchmark of the kernels finds each equal to its reference."""

from __future__ import annotations

import pytest

from benchmarks import kernels

SIZES = "--batch 2 --width 32 --mlp-width 48 --heads 2 --kv-heads 1 --head-dim 16 --rank 4".split()


@pytest.mark.parametrize("forward", [("--tokens", "1", "--past", "20"), ("--tokens", "12")])
def test_kernels_equal_their_references(forward, capsys, monkeypatch):
    monkeypatch.setattr(kernels, "SHARES", (0.5,))
    assert kernels.main([*SIZES, *forward]) == 0
    assert "attend" in capsys.readouterr().out
