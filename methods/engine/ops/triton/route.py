"""Router, forecaster and partition of one unit in two or three launches."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from methods.engine.ops.choose import Kernels, use_triton
from methods.engine.ops.triton.partition import Partition, partition_reference


class LinearScore(NamedTuple):
    """Execute where x @ weight + offset is above the threshold."""

    weight_D: Tensor
    """float32."""
    offset: Tensor | float
    """0-dim tensor on the device, or a number."""
    threshold: Tensor | float
    """The same; minus infinity executes all, infinity none."""


class LowRank(NamedTuple):
    """A forecaster: up @ act(down @ x + down_bias) + bias, weights in float32."""

    down_rD: Tensor
    up_Dr: Tensor
    bias_D: Tensor | None = None
    down_bias_r: Tensor | None = None
    silu: bool = False
    """SiLU between the two (the published forecaster); False is the closed form's linear map."""


class Routed(NamedTuple):
    """What the router decided."""

    scores_N: Tensor
    """float32, padding included."""
    execute_N: Tensor
    """bool, False for padding."""
    rows: Partition


def route_and_forecast(
    x_ND: Tensor,
    residual_ND: Tensor,
    valid_N: Tensor,
    score: LinearScore,
    forecast: LowRank | None,
    *,
    tokens: int,
    kernels: Kernels = "auto",
) -> Routed:
    """Decide for each token, and add the forecast to the residual of those that are bypassed.

    The score is accumulated in float32. The forecast's products take x and the float32 weights in
    TF32 if x is half precision, exactly otherwise; the residual is rounded once.

    Args:
        x_ND: the unit's normalised input, that of the router too.
        residual_ND: changed in place at bypassed tokens; padding and executed ones are untouched.
        valid_N: bool, False for padding.
        forecast: None adds nothing (skip).
        tokens: T, for the counts of each sequence.
    """
    if use_triton(kernels, x_ND):
        from methods.engine.ops.triton.route_kernel import launch_route

        return launch_route(x_ND, residual_ND, valid_N, score, None, forecast, tokens)
    scores_N = x_ND.float() @ score.weight_D + score.offset
    execute_N = (scores_N > score.threshold) & valid_N
    rows = forecast_bypassed(
        x_ND, residual_ND, valid_N, execute_N, forecast, tokens=tokens, kernels="torch"
    )
    return Routed(scores_N, execute_N, rows)


def forecast_bypassed(
    x_ND: Tensor,
    residual_ND: Tensor,
    valid_N: Tensor,
    execute_N: Tensor,
    forecast: LowRank | None,
    *,
    tokens: int,
    kernels: Kernels = "auto",
) -> Partition:
    """`route_and_forecast` for decisions that are made elsewhere (routers of another form)."""
    if use_triton(kernels, x_ND):
        from methods.engine.ops.triton.route_kernel import launch_route

        return launch_route(x_ND, residual_ND, valid_N, None, execute_N, forecast, tokens).rows
    execute_N = execute_N & valid_N
    if forecast is not None:
        estimate_ND = low_rank(x_ND, forecast).to(residual_ND.dtype)
        residual_ND += estimate_ND.masked_fill((execute_N | ~valid_N)[:, None], 0)
    return partition_reference(execute_N.view(-1, tokens), valid_N.view(-1, tokens))


def low_rank(x_ND: Tensor, forecast: LowRank) -> Tensor:
    """The forecast of every row, float32."""
    hidden_Nr = functional.linear(x_ND.float(), forecast.down_rD, forecast.down_bias_r)
    if forecast.silu:
        hidden_Nr = functional.silu(hidden_Nr)
    return functional.linear(hidden_Nr, forecast.up_Dr, forecast.bias_D)


def on_device(value: Tensor | float, like: Tensor) -> Tensor:
    """0-dim float32 tensor; a number is filled in by the device, not copied to it."""
    if isinstance(value, Tensor):
        return value
    return torch.full((), value, dtype=torch.float32, device=like.device)
