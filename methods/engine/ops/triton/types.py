"""What the operations take and give beside tensors; imports without Triton."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Partition(NamedTuple):
    """Places of a batch's tokens, executed ones first; everything int64, on the device."""

    index_N: Tensor
    """Places b * T + t: executed tokens in order, then bypassed ones, then padding."""
    executed: Tensor
    """0-dim: how many of `index_N` are executed."""
    bypassed: Tensor
    """0-dim: how many bypassed tokens follow them."""
    counts_B: Tensor
    """Executed tokens of each sequence."""
    starts_B: Tensor
    """Rank in `index_N` of each sequence's first executed token."""


class Routed(NamedTuple):
    """What the router decided."""

    scores_N: Tensor
    """float32, padding included."""
    execute_N: Tensor
    """bool, False for padding."""
    rows: Partition


class Sight(NamedTuple):
    """Which slots of the cache each executed query sees.

    The i-th executed query of sequence b, of token t, sees the slots from the first up to and
    including `past + t` (KV policy `keep`: a slot for every token) or, if `compact`, `past_b + i`
    (`evict`: a slot for every executed token). Slots beyond are not read, so the cache may be
    longer than what is in use.
    """

    tokens: int
    """T."""
    past: Tensor | int
    """Slots in use before this forward: a number, a 0-dim tensor (a static cache), or one for each
    sequence [B] (`evict`)."""
    compact: bool = False
    window: int | None = None
    """A query sees the last `window` slots up to its own only; needs `keep`, where slots are
    positions."""
    first_valid_B: Tensor | None = None
    """First slot that is not (left) padding."""
    first_N: Tensor | None = None
    """First slot that each row sees, in place of `window` and `first_valid_B`: for a window over a
    compact cache."""
