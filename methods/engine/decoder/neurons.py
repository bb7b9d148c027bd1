"""The neurons of a SwiGLU MLP: what they give, and their weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from methods.base import SwiGLU
from methods.engine.decoder.offload import materialised
from methods.engine.ops.row_ops import RowOps
from methods.engine.ops.swiglu import is_swiglu, matrices


def neurons_of(mlp: Any, x_ND: Tensor) -> Tensor:
    """Compute what the down projection reads of tokens, [N, F], without gradient.

    Raises:
        ValueError: the MLP is no SwiGLU.
    """
    _require_swiglu(mlp)
    return RowOps().silu_mul(mlp.gate_proj(x_ND), mlp.up_proj(x_ND))


def weights_of(mlp: Any) -> SwiGLU:
    """The weights themselves where the model has them in place, copies where they are offloaded.

    Raises:
        ValueError: the MLP is no SwiGLU, or its projections are more than weights.
    """
    _require_swiglu(mlp)
    parts = matrices(mlp)
    if parts is None:
        raise ValueError(
            "the projections of an MLP are more than matrices: no neuron of it can be kept"
        )
    held = []
    for part in parts:
        with materialised(part):
            held.append(part.weight.detach())
    return SwiGLU(*held)


def _require_swiglu(mlp: Any) -> None:
    if not is_swiglu(mlp):
        raise ValueError(f"{type(mlp).__name__} is no SwiGLU: no neuron of it can be kept")
