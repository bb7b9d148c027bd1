"""The MLP on a few rows of a CPU, with every product transposed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from methods.base import SwiGLU

CHUNK_ROWS = 512
ALIGNED_ROWS = 16
"""Rows of a transposed product are a multiple of this, so that its rows begin at a cache line."""


def turned_mlp(
    weights: SwiGLU, x_ND: Tensor, silu_mul: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """down(silu(gate(x)) * up(x)), [N, D], in chunks of rows.

    With few rows, the library splits W @ x.T between threads better than x @ W.T: along the
    longer side. Measured at widths 576 and 1536.
    """
    missing = _aligned(len(x_ND)) - len(x_ND)
    rows_ND = functional.pad(x_ND, (0, 0, 0, missing)) if missing else x_ND
    out = torch.empty_like(rows_ND)
    chunks = -(-len(rows_ND) // CHUNK_ROWS)
    rows = _aligned(-(-len(rows_ND) // chunks))
    for x, into in zip(rows_ND.split(rows), out.split(rows), strict=True):
        hidden_FN = silu_mul(weights.gate_FD @ x.t(), weights.up_FD @ x.t())
        torch.mm(hidden_FN.t(), weights.down_DF.t(), out=into)
    return out[: len(x_ND)]


def _aligned(rows: int) -> int:
    return -(-rows // ALIGNED_ROWS) * ALIGNED_ROWS
