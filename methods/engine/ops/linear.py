"""Linear layers that are weights alone, and the low-rank estimate of a routed site."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from methods.base import LinearUnit


def all_linear(modules: Iterable[Any]) -> bool:
    """True if all are plain linear layers, whose `weight_of` says it all; others must be called."""
    return all(type(module) is nn.Linear and _is_weight(module) for module in modules)


def _is_weight(module: nn.Linear) -> bool:
    """False with a hook, or if an adapter or an estimate stands in the place of the forward."""
    forward = _swapped_forward(module)
    hooked = module._forward_hooks or module._forward_pre_hooks
    return not hooked and (forward is None or hasattr(forward, "weight"))


def weight_of(module: nn.Linear) -> Tensor:
    """The matrix that a plain linear layer multiplies with now: its own, or a merged adapter's."""
    forward = _swapped_forward(module)
    weight: Tensor = module.weight if forward is None else forward.weight
    return weight


def _swapped_forward(module: nn.Linear) -> Any:
    """What the engine has put in the place of a module's forward, which keeps the `original`."""
    forward = module.__dict__.get("forward")
    return forward if hasattr(forward, "original") else None


def estimate(linear: LinearUnit, x: Tensor) -> Tensor | None:
    """Estimate what bypassed tokens get, float32: [N, D] -> [N, D] or [D] -> [D]; None: nothing."""
    if linear.down_rD is None or linear.up_Dr is None:
        return None
    hidden = _product(linear.down_rD, linear.down_bias_r, x.float())
    if linear.silu:
        hidden = functional.silu(hidden, inplace=True)
    return _product(linear.up_Dr, linear.bias_D, hidden)


def transposed(linear: LinearUnit) -> LinearUnit:
    """Copy both maps column by column, as row-wise loops read them."""
    if linear.down_rD is None or linear.up_Dr is None:
        return linear
    down, up = (weight.t().contiguous().t() for weight in (linear.down_rD, linear.up_Dr))
    return replace(linear, down_rD=down, up_Dr=up)


def _product(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    if x.dim() == 1 and bias is not None:
        return torch.addmv(bias, weight, x)
    return functional.linear(x, weight, bias)
