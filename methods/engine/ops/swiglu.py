"""The MLP of the known families on gathered rows, as fast as a CPU's matrix products go."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from methods.base import SwiGLU
from methods.engine.ops.linear import all_linear, weight_of
from methods.engine.ops.row_ops import RowOps

NAMES = ("gate_proj", "up_proj", "down_proj")


def is_swiglu(mlp: Any) -> bool:
    """True for down(silu(gate(x)) * up(x)), by the names that the known families use."""
    silu = type(getattr(mlp, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")
    return silu and all(hasattr(mlp, name) for name in NAMES)


def matrices(mlp: Any) -> list[Any] | None:
    """The projections of a SwiGLU; None if they are more than weights (a bias, an adapter)."""
    parts = [getattr(mlp, name) for name in NAMES]
    return parts if all_linear(parts) and all(part.bias is None for part in parts) else None


def swiglu(mlp: Any, x_RD: Tensor, ops: RowOps, index_N: Tensor | None = None) -> Tensor:
    """Run the MLP on some rows, [N, D], its intermediates in place where nothing needs them.

    At thousands of rows the intermediates are larger than the caches; writing each once instead
    of three times is a quarter of the time of the module's own forward.

    Args:
        index_N: the rows, int64; None means all.
    """
    rows = (x_RD if index_N is None else index_N).shape[0]
    if not rows:
        return x_RD[:0]
    weights = weights_for_few(mlp, x_RD, rows, ops)
    if weights is not None:
        return ops.mlp(weights, x_RD, index_N)
    x_ND = x_RD if index_N is None else x_RD.index_select(0, index_N)
    if not is_swiglu(mlp) or torch.is_grad_enabled():
        delta: Tensor = mlp(x_ND[None])  # experts want a batch
        return delta[0]
    down: Tensor = mlp.down_proj(ops.silu_mul(mlp.gate_proj(x_ND), mlp.up_proj(x_ND)))
    return down


def weights_for_few(mlp: Any, x: Tensor, rows: int, ops: RowOps) -> SwiGLU | None:
    """The weights, if `RowOps.mlp` or `add_mlp` may stand for the module on so many rows of x."""
    few = 1 < rows <= ops.mlp_rows and x.is_cpu and x.dtype == ops.dtype
    if not few or torch.is_grad_enabled() or not is_swiglu(mlp):
        return None
    parts = matrices(mlp)
    return None if parts is None else SwiGLU(*map(weight_of, parts))
