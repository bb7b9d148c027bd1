"""Timing of two computations in turn, so that a drifting machine slows both alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from runners.runtime.memory import PeakMemory
from runners.runtime.progress import progress


@dataclass(frozen=True)
class Timing:
    """Seconds of a repeated computation."""

    seconds: list[float]
    peak_memory_bytes: int

    @property
    def median(self) -> float:
        """Median, seconds."""
        return float(np.median(self.seconds))

    def spread(self) -> dict[str, float]:
        """`{median, p20, p80}` in seconds."""
        low, high = np.percentile(self.seconds, [20, 80])
        return {"median": self.median, "p20": float(low), "p80": float(high)}


def ratio(slow: Timing, fast: Timing) -> dict[str, float]:
    """Speed-up, taken pair by pair: `{median, p20, p80}`."""
    pairs = np.array(slow.seconds) / np.array(fast.seconds)
    low, high = np.percentile(pairs, [20, 80])
    return {"median": float(np.median(pairs)), "p20": float(low), "p80": float(high)}


def interleaved(
    runs: Sequence[Callable[[], float]],
    *,
    device: torch.device,
    warmup: int,
    repeats: int,
    label: str,
) -> list[Timing]:
    """Call the runs in turn, `warmup` rounds unseen and `repeats` rounds kept.

    Args:
        runs: each does its work once and returns the seconds of the part that counts.
    """
    seconds: list[list[float]] = [[] for _ in runs]
    peaks = [0 for _ in runs]
    for turn in progress(range(warmup + repeats), label):
        for index, run in enumerate(runs):
            peak = PeakMemory(device)
            taken = run()
            if turn >= warmup:
                seconds[index].append(taken)
                peaks[index] = max(peaks[index], peak.bytes())
    return [Timing(s, p) for s, p in zip(seconds, peaks, strict=True)]


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Wall seconds of one call, the device's queue drained before and after."""
    _drain(device)
    start = time.perf_counter()
    work()
    _drain(device)
    return time.perf_counter() - start


def _drain(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
