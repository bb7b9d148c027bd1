"""Where the time of a routed forward goes: seconds per kind of work, summed over units."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch


class Clock(Protocol):
    """Told by the executor what it is about to do."""

    def part(self, name: str) -> AbstractContextManager[None]:
        """Time the block under a name: router, rows, unit, forecast, scatter.

        `router` has the norm before the unit in it: one pass may do both.
        """


class NoClock:
    """Times nothing and costs next to nothing."""

    _nothing: AbstractContextManager[None] = nullcontext()

    def part(self, name: str) -> AbstractContextManager[None]:
        """Do nothing."""
        return self._nothing


class PartClock:
    """Times every part; on CUDA it waits for the device, so the whole is slower than without."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the block's wall time to `seconds[name]`."""
        start = self._now()
        yield
        self.seconds[name] += self._now() - start

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
