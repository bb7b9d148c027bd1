"""Tell whether `accelerate launch` (or torchrun) started several processes for one point.

Read from the environment, before anything heavy loads; what they do together is in `distributed`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from runners.errors import UserError


def world_size() -> int:
    """How many there are; 1 for a process that was started as any other."""
    try:
        return int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError:
        return 1


def is_main_process() -> bool:
    """Whether this one writes the results: the first, or the only one."""
    return world_size() == 1 or os.environ.get("RANK", "0") == "0"


def check_batch_sizes(sizes: Mapping[str, int]) -> None:
    """Refuse batches that several processes cannot share.

    Args:
        sizes: rows of a batch, by stage.

    Raises:
        UserError: one has fewer rows than there are processes.
    """
    for stage, rows in sizes.items():
        if rows < world_size():
            raise UserError(
                f"budget.{stage}.batch_size={rows} has less than a row for each of "
                f"{world_size()} processes: raise it, or launch fewer"
            )
