"""The row-wise operations as compiled loops; what a loop does not cover takes the PyTorch way."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from methods.base import LinearUnit
from methods.engine.host.build import MAX_RANK, library
from methods.engine.host.row_ops import RowOps
from methods.engine.norm import is_plain_rms
from methods.engine.rotary import Angles
from methods.engine.rows import Rows

LANES = 16
"""Widths and ranks of the forecast loop are a multiple of this."""


class CompiledRowOps(RowOps):
    """`RowOps` for float32 on a CPU, without gradient.

    Raises:
        NoCompiler: the loops cannot be compiled here.
    """

    compiled = True

    def __init__(self) -> None:
        self.loops: ctypes.CDLL = library()

    def norm(self, module: Any, x: Tensor) -> Tensor:
        """One pass; PyTorch takes three."""
        if not is_plain_rms(module, x) or not _covered(x, module.weight):
            return super().norm(module, x)
        out, width = torch.empty_like(x), x.shape[-1]
        self.loops.rms_norm(
            x.data_ptr(),
            module.weight.data_ptr(),
            module.variance_epsilon,
            out.data_ptr(),
            x.numel() // width,
            width,
        )
        return out

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """One pass; PyTorch takes two."""
        if not _covered(gate, up):
            return super().silu_mul(gate, up)
        self.loops.silu_mul(gate.data_ptr(), up.data_ptr(), gate.numel())
        return gate

    def rotate(self, x: Tensor, angles: Angles) -> Tensor:
        """One pass, angles read where they are; PyTorch takes three and two gathers."""
        if not _covered(x, angles.cos_Pd, angles.sin_Pd):
            return super().rotate(x, angles)
        out, place = torch.empty_like(x), angles.place_N
        heads, size = x.shape[-2:]
        self.loops.rotate(
            x.data_ptr(),
            angles.cos_Pd.data_ptr(),
            angles.sin_Pd.data_ptr(),
            None if place is None else place.data_ptr(),
            len(angles.cos_Pd),
            out.data_ptr(),
            x.numel() // (heads * size),
            heads,
            size,
        )
        return out

    def split(self, execute_BT: Tensor, valid_BT: Tensor) -> tuple[Rows, Tensor]:
        """One pass over the two masks."""
        on_host = execute_BT.device.type == valid_BT.device.type == "cpu"
        if not on_host or execute_BT.dtype != torch.bool or valid_BT.dtype != torch.bool:
            return super().split(execute_BT, valid_BT)
        execute_BT, valid_BT = execute_BT.contiguous(), valid_BT.contiguous()
        batch, tokens = execute_BT.shape
        places = torch.empty(2, batch * tokens, dtype=torch.int64)
        executed, bypassed = places.unbind()
        numbers = torch.empty(batch + 1, dtype=torch.int64)
        self.loops.partition(
            execute_BT.data_ptr(),
            valid_BT.data_ptr(),
            executed.data_ptr(),
            bypassed.data_ptr(),
            numbers.data_ptr(),
            batch,
            tokens,
        )
        *counts, others = numbers.tolist()
        return Rows(executed[: sum(counts)], counts, tokens), bypassed[:others]

    def add(self, into_BTD: Tensor, index_N: Tensor, delta_ND: Tensor) -> None:
        """Rows in parallel, without the check of indices."""
        if not _covered(into_BTD, delta_ND):
            super().add(into_BTD, index_N, delta_ND)
            return
        self.loops.add_rows(
            into_BTD.data_ptr(), index_N.data_ptr(), delta_ND.data_ptr(), *delta_ND.shape
        )

    def forecast(
        self, linear: LinearUnit, x_BTD: Tensor, into_BTD: Tensor, index_N: Tensor
    ) -> None:
        """Tiles of rows through both maps; PyTorch gathers, keeps intermediates and scatters."""
        down, up = linear.down_rD, linear.up_Dr
        if down is None or up is None:
            return
        rank, width = down.shape
        fits = rank % LANES == 0 and width % LANES == 0 and rank <= MAX_RANK
        biases = [bias for bias in (linear.down_bias_r, linear.bias_D) if bias is not None]
        if not fits or not _covered(x_BTD, into_BTD, down.t(), up.t(), *biases):
            super().forecast(linear, x_BTD, into_BTD, index_N)
            return
        self.loops.forecast(
            x_BTD.data_ptr(),
            into_BTD.data_ptr(),
            index_N.data_ptr(),
            len(index_N),
            width,
            rank,
            down.data_ptr(),
            _pointer(linear.down_bias_r),
            up.data_ptr(),
            _pointer(linear.bias_D),
            linear.silu,
        )


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _covered(*tensors: Tensor) -> bool:
    """True if loops may read and write these through their addresses."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    return all(
        tensor.dtype == torch.float32 and tensor.device.type == "cpu" and tensor.is_contiguous()
        for tensor in tensors
    )
