"""The MLP of the known families on gathered rows, as fast as a CPU's matrix products go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from methods.base import SwiGLU
from methods.engine.adapter import all_linear
from methods.engine.host.row_ops import RowOps
from methods.engine.offload import at_hand

TURNED_ROWS = 1024
"""Up to here W @ x.T is faster than x @ W.T on a CPU: with few rows, the library splits the work
between threads better along the longer side. Measured at widths 576 and 1536."""
CHUNK_ROWS = 512
ALIGNED_ROWS = 16
"""Rows of a turned product are a multiple of this, so that its rows begin at a cache line."""
NAMES = ("gate_proj", "up_proj", "down_proj")


def is_swiglu(mlp: Any) -> bool:
    """True for down(silu(gate(x)) * up(x)), by the names that the known families use."""
    silu = type(getattr(mlp, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")
    return silu and all(hasattr(mlp, name) for name in NAMES)


def swiglu(mlp: Any, x_ND: Tensor, ops: RowOps) -> Tensor:
    """The MLP on gathered rows, [N, D], with its intermediates in place where nothing needs them.

    At thousands of rows the intermediates are larger than the caches; writing each once instead
    of three times is a quarter of the time of the module's own forward.
    """
    if not is_swiglu(mlp) or torch.is_grad_enabled():
        delta: Tensor = mlp(x_ND)
        return delta
    on_cpu = x_ND.device.type == "cpu" and x_ND.dtype == torch.float32
    if on_cpu and 1 < len(x_ND) <= TURNED_ROWS and _is_plain(mlp):
        return _turned(mlp, x_ND, ops)
    down: Tensor = mlp.down_proj(_hidden(mlp, x_ND, ops))
    return down


def neurons_of(mlp: Any, x_ND: Tensor) -> Tensor:
    """What the down projection reads of tokens, [N, F], without gradient.

    Raises:
        ValueError: the MLP is no SwiGLU.
    """
    _require_swiglu(mlp)
    return _hidden(mlp, x_ND, RowOps())


def weights_of(mlp: Any) -> SwiGLU:
    """The weights themselves where the model has them in place, copies where they are offloaded.

    Raises:
        ValueError: the MLP is no SwiGLU, or its projections are more than weights.
    """
    _require_swiglu(mlp)
    parts = [getattr(mlp, name) for name in NAMES]
    if not _are_matrices(parts):
        raise ValueError(
            "the projections of an MLP are more than matrices: no neuron of it can be kept"
        )
    held = []
    for part in parts:
        with at_hand(part):
            held.append(part.weight.detach())
    return SwiGLU(*held)


def _require_swiglu(mlp: Any) -> None:
    if not is_swiglu(mlp):
        raise ValueError(f"{type(mlp).__name__} is no SwiGLU: no neuron of it can be kept")


def _is_plain(mlp: Any) -> bool:
    """True if the projections are weights only: no bias, no adapter, and nobody watches them."""
    parts = [getattr(mlp, name) for name in NAMES]
    if not _are_matrices(parts):
        return False
    return not any(part._forward_hooks or part._forward_pre_hooks for part in parts)


def _are_matrices(parts: Sequence[Any]) -> bool:
    """True if the projections are weights only, without bias or adapter."""
    return all_linear(parts) and all(part.bias is None for part in parts)


def _hidden(mlp: Any, x_ND: Tensor, ops: RowOps) -> Tensor:
    """What the down projection reads, without gradient: each intermediate is written once."""
    return ops.silu_mul(mlp.gate_proj(x_ND), mlp.up_proj(x_ND))


def _turned(mlp: Any, x_ND: Tensor, ops: RowOps) -> Tensor:
    """The same with every product transposed, in chunks of rows."""
    missing = _aligned(len(x_ND)) - len(x_ND)
    rows_ND = functional.pad(x_ND, (0, 0, 0, missing)) if missing else x_ND
    out = torch.empty_like(rows_ND)
    chunks = -(-len(rows_ND) // CHUNK_ROWS)
    rows = _aligned(-(-len(rows_ND) // chunks))
    for x, into in zip(rows_ND.split(rows), out.split(rows), strict=True):
        hidden_FN = ops.silu_mul(mlp.gate_proj.weight @ x.t(), mlp.up_proj.weight @ x.t())
        torch.mm(hidden_FN.t(), mlp.down_proj.weight.t(), out=into)
    return out[: len(x_ND)]


def _aligned(rows: int) -> int:
    return -(-rows // ALIGNED_ROWS) * ALIGNED_ROWS
