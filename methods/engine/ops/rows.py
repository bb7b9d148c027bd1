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


def take(values_BTD: Tensor, index_N: Tensor) -> Tensor:
    """[B, T, D] -> [N, D]."""
    return values_BTD.flatten(0, 1).index_select(0, index_N)
