"""The row-wise operations of bfloat16 as compiled loops whose products run on matrix units."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from methods.base import LinearUnit, SwiGLU
from methods.engine.ops.cpu.build import CHUNK
from methods.engine.ops.cpu.compiled import LANES, CompiledRowOps
from methods.engine.ops.linear import all_linear, weight_of
from methods.engine.ops.row_ops import RowOps

DEEP = 32
"""Inputs, outputs, ranks and heads are a multiple of this."""


class TiledRowOps(CompiledRowOps):
    """`CompiledRowOps` for bfloat16 on a CPU with AMX; sums are float32.

    Weights are read where they lie, as in the float32 loops; the library packs them for every call.
    """

    dtype = torch.bfloat16
    lanes = DEEP
    copies = 2
    mlp_rows = 2**62
    packed_rows = CHUNK
    forecasts_all = True

    def linear(self, module: Any, x_NI: Tensor) -> Tensor:
        """The library makes a kernel for each number of rows, and packs the weight besides."""
        if not all_linear([module]) or module.bias is not None:
            return super().linear(module, x_NI)
        (rows, inputs), weight = x_NI.shape, weight_of(module)
        outputs = weight.shape[0]
        if outputs % DEEP or inputs % DEEP or not self.covers(x_NI, weight):
            return super().linear(module, x_NI)
        out = x_NI.new_empty(rows, outputs)
        scratch = x_NI.new_empty(min(-(-rows // LANES) * LANES, CHUNK) * inputs)
        self.loops.linear(x_NI, rows, weight, scratch, out, inputs, outputs)
        return out

    def few(self, weights: SwiGLU, x: Tensor, count: int) -> bool:
        """Of any number of rows: the loop takes some at a time."""
        neurons, width = weights.gate_FD.shape
        return count > 0 and width % DEEP == neurons % DEEP == 0 and self.covers(x, *weights)

    def maps(self, linear: LinearUnit) -> LinearUnit:
        """Both maps rounded to bfloat16, as they lie."""
        if linear.down_rD is None or linear.up_Dr is None or not self.sized(linear.down_rD):
            return linear
        down, up = (map_.to(self.dtype).contiguous() for map_ in (linear.down_rD, linear.up_Dr))
        return replace(linear, down_rD=down, up_Dr=up)

    def lie(self, down_rD: Tensor, up_Dr: Tensor) -> bool:
        """True if the maps lie as `maps` gives them."""
        return self.covers(down_rD, up_Dr)

    attend_one = RowOps.attend_one  # one query shares nothing: the library's kernel is faster
