"""Where the time of a routed forward goes: seconds per kind of work, summed over units."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from methods.base import Site

UNTIMED: AbstractContextManager[None] = nullcontext()


class Bench:
    """What a benchmark puts into gathered execution: a clock, and decisions of its own.

    Args:
        device: of the model; on CUDA the clock waits for it, so the whole is slower than without.
        draw: (site, valid_BT) -> execute_BT instead of the router's decision, which is still made.
    """

    def __init__(
        self, device: torch.device, draw: Callable[[Site, Tensor], Tensor] | None = None
    ) -> None:
        self.device, self.draw = device, draw
        self.timing = False
        """True adds up `seconds`."""
        self.seconds: dict[str, float] = defaultdict(float)

    def part(self, name: str) -> AbstractContextManager[None]:
        """Add the block's wall time to `seconds[name]`: router, rows, unit, forecast, scatter.

        `router` has the norm before the unit in it: one pass may do both.
        """
        return self._timed(name) if self.timing else UNTIMED

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = self._now()
        yield
        self.seconds[name] += self._now() - start

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
