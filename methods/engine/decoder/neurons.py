"""The neurons of a SwiGLU MLP: what they give, and their weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from methods.base import SwiGLU
from methods.engine.decoder.families import LayerParts
from methods.engine.decoder.offload import materialised
from methods.engine.ops.row_ops import RowOps
from methods.engine.ops.swiglu import is_swiglu, matrices


def neurons_of(part: LayerParts, x_ND: Tensor) -> Tensor:
    """Compute what the down projection reads of tokens, [N, F], without gradient.

    Raises:
        ValueError: the MLP is no SwiGLU whose output is added as it is.
    """
    mlp = _require_swiglu(part)
    return RowOps().silu_mul(mlp.gate_proj(x_ND), mlp.up_proj(x_ND))


def weights_of(part: LayerParts) -> SwiGLU:
    """The weights themselves where the model has them in place, copies where they are offloaded.

    Raises:
        ValueError: the MLP is no SwiGLU whose output is added as it is, or its projections are more
            than weights.
    """
    parts = matrices(_require_swiglu(part))
    if parts is None:
        raise ValueError(
            "the projections of an MLP are more than matrices: no neuron of it can be kept"
        )
    held = []
    for linear in parts:
        with materialised(linear):
            held.append(linear.weight.detach())
    return SwiGLU(*held)


def _require_swiglu(part: LayerParts) -> Any:
    """The MLP, of which each neuron adds its own to the residual stream."""
    mlp, name = part.mlp, type(part.mlp).__name__
    if not is_swiglu(mlp):
        raise ValueError(f"{name} is no SwiGLU: no neuron of it can be kept")
    if not part.adds_as_is:
        raise ValueError(f"what {name} gives is normed or scaled: no neuron of it can be kept")
    return mlp
