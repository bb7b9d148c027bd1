"""Measure memory, and go on with fewer rows a pass where it does not suffice."""

from __future__ import annotations

import ctypes
import gc
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from transformers import PreTrainedModel

log = logging.getLogger(__name__)

SAYS = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "bad_alloc",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""Words of a RuntimeError of torch's allocators and libraries, which have no class of their own."""
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")

T = TypeVar("T")
R = TypeVar("R")


class PeakMemory:
    """Largest memory in use since construction: CUDA allocations, else resident set size.

    On Linux the kernel's high-water mark is reset first; elsewhere it is the process's own.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        # not Linux or not permitted: the mark then covers the whole process
        with suppress(OSError):
            _CLEAR.write_text("5")

    def bytes(self) -> int:
        """Peak so far."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        try:
            lines = _STATUS.read_text().splitlines()
        except OSError:
            import resource

            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def give_back() -> None:
    """Return what was freed to the system, or the next peak is that of what ran before.

    glibc keeps the freed memory of a training; elsewhere this collects garbage alone.
    """
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the host or on a device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in SAYS)


def attempt(work: Callable[[], R]) -> R | None:
    """Run `work`; None if memory does not suffice, and what it held is then given back."""
    try:
        return work()
    except Exception as error:
        if not out_of_memory(error):
            raise
    # outside the `except` block, whose traceback still holds the tensors of the pass that failed
    free_memory()
    return None


def free_memory() -> None:
    """Give back what nobody refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Fitting:
    """Runs batches of an evaluation in parts that fit into memory; what fitted once is kept to.

    Args:
        model: if it is routed, what a failed pass had counted is forgotten.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.rows: int | None = None
        """Largest part that is tried; None while everything has fitted."""
        self.halvings = 0
        """How often memory did not suffice."""

    def run(
        self,
        batch: Sequence[T],
        work: Callable[[Sequence[T]], list[R]],
        alone: Callable[[T], list[R]] | None = None,
    ) -> list[R]:
        """`work(batch)`, or what it gives for the parts of the batch, one after the other.

        Args:
            alone: does the work of one row in another way, where `work` cannot.

        Raises:
            whatever `work` raises: for memory, only if one row alone does not fit.
        """
        done: list[R] = []
        start = 0
        while start < len(batch):
            part = batch[start : start + (self.rows or len(batch))]
            found = self.attempt(partial(work, part), len(part) > 1 or alone is not None)
            if found is None and len(part) > 1:
                self.rows = len(part) // 2
                log.warning("out of memory: evaluation goes on with %d rows a pass", self.rows)
                continue
            if found is None:
                assert alone is not None
                found = alone(part[0])
            done += found
            start += len(part)
        return done

    def attempt(self, work: Callable[[], R], again: bool) -> R | None:
        """What `work` gives; None, and nothing counted, if memory does not suffice.

        Args:
            again: whether there is another way; otherwise the error is raised.
        """
        if not again:
            return work()
        routing = getattr(self.model, "routing", None)
        counted = None if routing is None else routing.counters.copy()
        found = attempt(work)
        if found is None:
            self.halvings += 1
            if routing is not None:
                routing.counters = counted
        return found
