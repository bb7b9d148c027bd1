"""Peak memory sees an allocation that is gone when it is read."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from runners.runtime.memory import PeakMemory, give_back

MIB = 2**20


def touch(mebibytes):
    """Allocate, write and free."""
    torch.ones(mebibytes * MIB, dtype=torch.uint8)


def resident_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_peak_is_of_its_own_stretch():
    touch(300)
    peak, before = PeakMemory(torch.device("cpu")), resident_bytes()
    assert peak.bytes() < before + 100 * MIB
    touch(200)
    grown = peak.bytes() - before
    assert 180 * MIB < grown < 260 * MIB
    assert resident_bytes() < before + 100 * MIB


def test_peak_without_proc(monkeypatch, tmp_path):
    monkeypatch.setattr("runners.runtime.memory._STATUS", tmp_path / "none")
    monkeypatch.setattr("runners.runtime.memory._CLEAR", tmp_path / "none" / "clear")
    found = PeakMemory(torch.device("cpu")).bytes()
    assert 50 * MIB < found < 100_000 * MIB


def test_freed_memory_is_no_part_of_the_next_peak():
    """Pieces below the size that the system lends by itself, and one that pins the heap's end."""
    if not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("glibc alone keeps freed memory in a heap")
    pieces = [torch.ones(16 * 1024) for _ in range(3000)]
    pinned = torch.ones(16)
    before = resident_bytes()
    pieces.clear()
    give_back()
    assert before - PeakMemory(torch.device("cpu")).bytes() > 120 * MIB
    assert pinned.sum() == 16
