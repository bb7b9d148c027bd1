"""The row-wise operations of bfloat16 as compiled loops whose products run on matrix units."""

from __future__ import annotations

from collections.abc import Sequence
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

    def linears(self, modules: Sequence[Any], x: Tensor) -> list[Tensor]:
        """The library makes a kernel for each number of rows, and packs the weights besides."""
        plain = all_linear(modules) and all(module.bias is None for module in modules)
        weights = [weight_of(module) for module in modules] if plain else []
        shapes, inputs = {weight.shape for weight in weights}, x.shape[-1]
        if len(shapes) != 1 or len(weights) > 2 or not self.covers(x, *weights):
            return super().linears(modules, x)
        outputs = weights[0].shape[0]
        if outputs % DEEP or inputs % DEEP:
            return super().linears(modules, x)
        rows = x.numel() // inputs
        out = [x.new_empty(*x.shape[:-1], outputs) for _ in weights]
        scratch = x.new_empty(-(-rows // LANES) * LANES * inputs)
        (weight, second), (first_out, second_out) = ((*pair, None)[:2] for pair in (weights, out))
        self.loops.linear(x, rows, weight, second, scratch, first_out, second_out, inputs, outputs)
        return out

    def few(self, weights: SwiGLU, x: Tensor, count: int) -> bool:
        """Of any number of rows: the loop takes some at a time."""
        neurons, width = weights.gate_FD.shape
        return count > 0 and width % DEEP == neurons % DEEP == 0 and self.covers(x, *weights)

    def maps(self, linear: LinearUnit) -> LinearUnit:
        """Both maps rounded to bfloat16 and packed."""
        if linear.down_rD is None or linear.up_Dr is None or not self.sized(linear.down_rD):
            return linear
        down, up = (_packed(map_.to(self.dtype)) for map_ in (linear.down_rD, linear.up_Dr))
        return replace(linear, down_rD=down, up_Dr=up)

    def lie(self, down_rD: Tensor, up_Dr: Tensor) -> bool:
        """True if the maps lie as `maps` gives them."""
        return self.covers(down_rD, up_Dr)

    attend_one = RowOps.attend_one  # one query shares nothing: the library's kernel is faster


def _packed(weight_OI: Tensor) -> Tensor:
    """Panels of `LANES` outputs: pairs of inputs by outputs, kept in the weight's own shape."""
    outputs, inputs = weight_OI.shape
    panels = weight_OI.reshape(outputs // LANES, LANES, inputs // 2, 2)
    return panels.transpose(1, 2).contiguous().view(outputs, inputs)
