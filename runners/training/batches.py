"""Batches of a stage: every row once an epoch, in an order drawn from the stage's seed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from methods.base import StageBudget
from runners.errors import UserError


class Batches:
    """Endless batches of token rows.

    Args:
        rows: int64 [n, seq_len].
        budget: of the stage.
        device: where batches go.

    Raises:
        UserError: fewer rows than a batch has.
    """

    def __init__(self, rows: Tensor, budget: StageBudget, device: torch.device) -> None:
        if len(rows) < budget.batch_size:
            raise UserError(
                f"the training text gives {len(rows)} rows of {budget.seq_len} tokens, fewer than "
                f"a batch of {budget.batch_size}: give more text or a smaller budget"
            )
        self.rows, self.size, self.device = rows, budget.batch_size, device
        self.order = torch.randperm(len(rows))
        """Rows to come, int64; replaced and never written to, so that who holds it can go back."""

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        while len(self.order) < self.size:
            self.order = torch.cat([self.order, torch.randperm(len(self.rows))])
        batch = self.rows[self.order[: self.size]].to(self.device)
        self.order = self.order[self.size :]
        return batch
