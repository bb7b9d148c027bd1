"""Which tokens of a batch a unit executes, as indices that a gather can use."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Executed tokens of a [B, T] batch, in order of sequence, then of position."""

    index_N: Tensor
    """int64: place of each token in the flattened batch, b * T + t."""
    counts: list[int]
    """Executed tokens of each sequence; their sum is N."""
    tokens: int
    """T."""

    @property
    def number(self) -> int:
        """N."""
        return self.index_N.shape[0]

    def per_sequence(self) -> list[tuple[int, Tensor]]:
        """(b, places t of its executed tokens) of each sequence that executes any."""
        if len(self.counts) == 1:
            return [(0, self.index_N)] if self.number else []
        parts = self.index_N.split(self.counts)
        return [
            (b, part - b * self.tokens)
            for b, (part, count) in enumerate(zip(parts, self.counts, strict=True))
            if count
        ]


def executed_rows(execute_BT: Tensor) -> Rows:
    """Rows of a bool mask; one transfer to the host, for the counts."""
    batch, tokens = execute_BT.shape
    index = execute_BT.flatten().nonzero().squeeze(1)
    counts = [len(index)] if batch == 1 else execute_BT.sum(1).tolist()
    return Rows(index, counts, tokens)


def take(values_BTD: Tensor, index_N: Tensor) -> Tensor:
    """[B, T, D] -> [N, D]."""
    return values_BTD.flatten(0, 1).index_select(0, index_N)


def put(residual_BTD: Tensor, index_N: Tensor, delta_ND: Tensor) -> None:
    """Add each row's delta to its token, in place."""
    residual_BTD.view(-1, residual_BTD.shape[-1]).index_add_(
        0, index_N, delta_ND.to(residual_BTD.dtype)
    )


def bypassed_index(execute_BT: Tensor, valid_BT: Tensor) -> Tensor:
    """Places in the flattened batch of real tokens that are not executed, int64 [M]."""
    return (valid_BT & ~execute_BT).flatten().nonzero().squeeze(1)


def rank_BT(execute_BT: Tensor) -> Tensor:
    """int64: executed tokens of the sequence up to and including each token."""
    return execute_BT.long().cumsum(1)
