"""Linear layers of some rows: gathered before the product, or scattered and added after it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from methods.engine.ops.choose import Kernels, use_triton


def linear_rows(
    x_NI: Tensor,
    index_N: Tensor,
    count: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None = None,
    *,
    kernels: Kernels = "auto",
) -> Tensor:
    """Linear layer of the gathered rows, compact: row n is that of x[index[n]].

    Args:
        x_NI: input of all rows; bfloat16, float16 or float32.
        index_N: rows of x, int64.
        count: 0-dim integer on the device: how many of `index_N` are meant.
        weight_OI: as in `nn.Linear`, the dtype of x, last dimension contiguous.
        bias_O: added in float32.

    Returns:
        [N, O] in the dtype of x; rows from `count` on are undefined.
    """
    if not use_triton(kernels, x_NI):
        return functional.linear(x_NI.index_select(0, index_N), weight_OI, bias_O)
    from methods.engine.ops.triton.linear_rows_kernel import launch_rows

    out_NO = x_NI.new_empty(len(index_N), len(weight_OI))
    launch_rows(x_NI, index_N, count, weight_OI, bias_O, out_NO, gather=True, add=False)
    return out_NO


def linear_rows_add(
    compact_NI: Tensor,
    residual_NO: Tensor,
    index_N: Tensor,
    count: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None = None,
    *,
    kernels: Kernels = "auto",
) -> None:
    """Linear layer of compact rows, added in place: residual[index[n]] += linear(compact[n]).

    Args:
        compact_NI: row n belongs to row index[n] of the residual; those from `count` on may hold
            anything.
        residual_NO: changed in place; last dimension contiguous.
        index_N: rows of the residual, int64, the first `count` of them distinct and all of them
            in range.
        count: 0-dim integer on the device.
        weight_OI, bias_O: as in `linear_rows`.
    """
    if use_triton(kernels, compact_NI):
        from methods.engine.ops.triton.linear_rows_kernel import launch_rows

        launch_rows(
            compact_NI, index_N, count, weight_OI, bias_O, residual_NO, gather=False, add=True
        )
        return
    delta_NO = functional.linear(compact_NI, weight_OI, bias_O)
    add_rows(residual_NO, index_N, count, delta_NO)


def add_rows(residual_ND: Tensor, index_N: Tensor, count: Tensor, delta_ND: Tensor) -> None:
    """residual[index[n]] += delta[n] for n < count, in place, without waiting for the device."""
    unused_N = torch.arange(len(index_N), device=index_N.device) >= count
    delta_ND = delta_ND.masked_fill(unused_N[:, None], 0)
    residual_ND.index_add_(0, index_N, delta_ND.to(residual_ND.dtype))
