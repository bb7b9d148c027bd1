"""Linear layers and the gated MLP of executed rows: gathered before, scattered and added after."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from methods.base import SwiGLU
from methods.engine.ops.choose import Kernels, use_triton
from methods.engine.ops.triton.types import Partition

Biases = tuple[Tensor | None, Tensor | None, Tensor | None]


def linear_rows(
    x_NI: Tensor,
    rows: Partition,
    weight_OI: Tensor,
    bias_O: Tensor | None = None,
    *,
    kernels: Kernels = "auto",
) -> Tensor:
    """Apply a linear layer to the gathered rows, compact: row n is that of x[rows.index_N[n]].

    Args:
        x_NI: input of all rows; bfloat16, float16 or float32.
        weight_OI: as in `nn.Linear`, the dtype of x, last dimension contiguous.
        bias_O: added in float32.

    Returns:
        [N, O] in the dtype of x; rows that are not executed are undefined.
    """
    if not use_triton(kernels, x_NI):
        return functional.linear(x_NI.index_select(0, rows.index_N), weight_OI, bias_O)
    from methods.engine.ops.triton.linear_rows_kernel import launch_rows

    out_NO = x_NI.new_empty(len(rows.index_N), len(weight_OI))
    launch_rows(x_NI, rows, weight_OI, bias_O, out_NO, gather=True)
    return out_NO


def linear_rows_add(
    compact_NI: Tensor,
    residual_NO: Tensor,
    rows: Partition,
    weight_OI: Tensor,
    bias_O: Tensor | None = None,
    *,
    kernels: Kernels = "auto",
) -> None:
    """Add a linear layer of compact rows in place: residual[index[n]] += linear(compact[n]).

    Args:
        compact_NI: in the order of `rows`; those that are not executed may hold anything.
        residual_NO: changed in place; last dimension contiguous.
        weight_OI, bias_O: as in `linear_rows`.
    """
    if use_triton(kernels, compact_NI):
        from methods.engine.ops.triton.linear_rows_kernel import launch_rows

        launch_rows(compact_NI, rows, weight_OI, bias_O, residual_NO, gather=False)
        return
    delta_NO = functional.linear(compact_NI, weight_OI, bias_O)
    unused_N = torch.arange(len(rows.index_N), device=rows.index_N.device) >= rows.executed
    delta_NO = delta_NO.masked_fill(unused_N[:, None], 0)
    residual_NO.index_add_(0, rows.index_N, delta_NO.to(residual_NO.dtype))


def swiglu_rows(
    x_ND: Tensor,
    residual_ND: Tensor,
    rows: Partition,
    weights: SwiGLU,
    biases: Biases = (None, None, None),
    *,
    kernels: Kernels = "auto",
) -> None:
    """Add the gated MLP of executed rows: residual[i] += down(silu(gate(x[i])) * up(x[i])).

    That of Shazeer (arXiv 2002.05202) with SiLU. With no executed row no weight is read.

    Args:
        x_ND: normalised input of all rows; bfloat16, float16 or float32.
        residual_ND: changed in place; last dimension contiguous.
        weights: in the dtype of x.
        biases: of gate, up and down.
    """
    gate, up, down = zip(weights, biases, strict=True)
    if use_triton(kernels, x_ND):
        from methods.engine.ops.triton.linear_rows_kernel import launch_rows

        middle_NF = x_ND.new_empty(len(rows.index_N), len(weights.gate_FD))
        launch_rows(x_ND, rows, *gate, middle_NF, gather=True, up=up)
    else:
        some_ND = x_ND.index_select(0, rows.index_N)
        middle_NF = functional.silu(functional.linear(some_ND, *gate))
        middle_NF = middle_NF * functional.linear(some_ND, *up)
    linear_rows_add(middle_NF, residual_ND, rows, *down, kernels=kernels)
