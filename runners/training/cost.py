"""What a stage costs, over all the processes that worked on it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch

from methods.base import Probe
from runners.runtime.memory import PeakMemory


class Meter:
    """Seconds, tokens that the probe read, and peak memory, from construction on.

    Args:
        device: whose memory counts.
        probe: counts what it reads in `tokens_read`, if it counts.
    """

    def __init__(self, device: torch.device, probe: Probe) -> None:
        self.probe, self.peak = probe, PeakMemory(device)
        self._began, self._read = time.perf_counter(), self._tokens()
        self._before: Mapping[str, Any] = {"seconds": 0.0, "tokens": 0, "peak_memory_bytes": 0}

    def carry(self, before: Mapping[str, Any]) -> None:
        """Add what `read` gave when an earlier process wrote its checkpoint."""
        self._before = before

    def read(self) -> dict[str, Any]:
        """`seconds`, `tokens`, `peak_memory_bytes` up to now."""
        before = self._before
        return {
            "seconds": before["seconds"] + time.perf_counter() - self._began,
            "tokens": before["tokens"] + self._tokens() - self._read,
            "peak_memory_bytes": max(before["peak_memory_bytes"], self.peak.bytes()),
        }

    def _tokens(self) -> int:
        return int(getattr(self.probe, "tokens_read", 0))
