"""Peak memory of a stretch of work."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


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
