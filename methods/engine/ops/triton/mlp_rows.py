"""The gated MLP of some rows: gather, SwiGLU, down projection, scatter and add."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from methods.engine.ops.choose import Kernels, use_triton
from methods.engine.ops.triton.linear_rows import add_rows, linear_rows_add


def swiglu_rows(
    x_ND: Tensor,
    residual_ND: Tensor,
    index_N: Tensor,
    count: Tensor,
    gate_FD: Tensor,
    up_FD: Tensor,
    down_DF: Tensor,
    *,
    gate_bias_F: Tensor | None = None,
    up_bias_F: Tensor | None = None,
    down_bias_D: Tensor | None = None,
    kernels: Kernels = "auto",
) -> None:
    """residual[i] += down(silu(gate(x[i])) * up(x[i])) for the first `count` places i of the index.

    The gated MLP of Shazeer (arXiv 2002.05202) with SiLU. With `count` 0 no weight is read.

    Args:
        x_ND: normalised input of all rows; bfloat16, float16 or float32.
        residual_ND: changed in place; last dimension contiguous.
        index_N: rows, int64, all in range, the first `count` of them distinct.
        count: 0-dim integer on the device.
        gate_FD, up_FD, down_DF: as in `nn.Linear`, in the dtype of x.
    """
    if not use_triton(kernels, x_ND):
        rows_ND = x_ND.index_select(0, index_N)
        gate_NF = functional.silu(functional.linear(rows_ND, gate_FD, gate_bias_F))
        middle_NF = gate_NF * functional.linear(rows_ND, up_FD, up_bias_F)
        delta_ND = functional.linear(middle_NF, down_DF, down_bias_D)
        add_rows(residual_ND, index_N, count, delta_ND)
        return
    from methods.engine.ops.triton.mlp_rows_kernel import launch_swiglu

    middle_NF = launch_swiglu(x_ND, index_N, count, gate_FD, up_FD, gate_bias_F, up_bias_F)
    linear_rows_add(middle_NF, residual_ND, index_N, count, down_DF, down_bias_D, kernels=kernels)
