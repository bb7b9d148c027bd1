"""Triton where it is installed, and the choice of tile sizes by measurement.

Without Triton the files with kernels still import; `choose.use_triton` keeps them from being run.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from methods.engine.ops.choose import interpreting

PROGRAMS = 264
"""Programs that fill the device: two on each of an H100's 132 multiprocessors."""

try:
    import triton
    from triton import language

    tl: Any = language
    jit: Any = triton.jit
    EMULATE = tl.constexpr(interpreting())
except ImportError:
    tl = None
    EMULATE = False

    def jit(fn: Any = None, **_: Any) -> Any:
        """Leaves the function as it is: there is no compiler."""
        return fn if fn is not None else lambda function: function


@jit  # type: ignore[untyped-decorator]
def dot(a, b, acc, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """acc + a @ b in float32; the interpreter keeps bfloat16 as bits and needs it widened."""
    if EMULATE:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@jit  # type: ignore[untyped-decorator]
def load(tile, mask, EVEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile with zeros where the mask is not set; unmasked if EVEN, where it always is."""
    return tl.load(tile) if EVEN else tl.load(tile, mask=mask, other=0.0)


def bucket(number: int) -> int:
    """Smallest power of two that is at least `number`; problems of one bucket share their tiles."""
    return 1 << max(number - 1, 0).bit_length()


def floor_power(number: int) -> int:
    """Largest power of two that is at most `number`."""
    return 1 << (number.bit_length() - 1)


def lane_width(number: int) -> int:
    """Width of a tile that holds `number` columns: a power of two, 16 at least for `tl.dot`."""
    return max(bucket(number), 16)


class Tiles(NamedTuple):
    """Sizes of one program's tile, and how the compiler schedules it."""

    rows: int
    cols: int
    inner: int
    warps: int = 4
    stages: int = 3

    @property
    def options(self) -> dict[str, int]:
        """Launch options of Triton."""
        return {"num_warps": self.warps, "num_stages": self.stages}


class Tuner:
    """Picks tiles once per problem by timing the candidates on the device.

    Not `triton.autotune`: that times the call at hand, whose count of executed rows may be zero,
    and repeats it on the caller's tensors, which these kernels add to.
    """

    def __init__(self) -> None:
        self.best: dict[Hashable, Tiles] = {}

    def pick(
        self, key: Hashable, choices: Sequence[Tiles], trial: Callable[[], Callable[[Tiles], None]]
    ) -> Tiles:
        """The fastest of `choices`; the first one off CUDA and while a graph is captured.

        Args:
            key: what the timing depends on.
            choices: best guess first.
            trial: makes scratch arguments and returns what launches the kernel on them.
        """
        if key in self.best:
            return self.best[key]
        if len(choices) == 1 or interpreting() or torch.cuda.is_current_stream_capturing():
            return choices[0]
        launch = trial()
        times = [self._time(launch, tiles) for tiles in choices]
        self.best[key] = choices[times.index(min(times))]
        return self.best[key]

    @staticmethod
    def _time(launch: Callable[[Tiles], None], tiles: Tiles) -> float:
        """Median milliseconds; infinite where the tile does not fit the device."""
        run = partial(launch, tiles)
        try:
            return float(triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median"))
        except triton.runtime.errors.OutOfResources:
            return float("inf")
