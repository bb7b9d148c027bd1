"""The estimate of a site whose forecaster is a pair of plain maps."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from methods.base import LinearUnit


def estimate(linear: LinearUnit, x: Tensor) -> Tensor | None:
    """What bypassed tokens get, float32: [N, D] -> [N, D] or [D] -> [D]; None means nothing."""
    if linear.down_rD is None or linear.up_Dr is None:
        return None
    hidden = _product(linear.down_rD, linear.down_bias_r, x.float())
    if linear.silu:
        hidden = functional.silu(hidden, inplace=True)
    return _product(linear.up_Dr, linear.bias_D, hidden)


def turned(linear: LinearUnit) -> LinearUnit:
    """The same with both maps stored by columns, as row-wise loops read them."""
    if linear.down_rD is None or linear.up_Dr is None:
        return linear
    down, up = (weight.t().contiguous().t() for weight in (linear.down_rD, linear.up_Dr))
    return replace(linear, down_rD=down, up_Dr=up)


def _product(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    if x.dim() == 1 and bias is not None:
        return torch.addmv(bias, weight, x)
    return functional.linear(x, weight, bias)
