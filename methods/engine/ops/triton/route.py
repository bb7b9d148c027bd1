"""Router, forecaster and the order of the rows of one unit, in two or three launches."""

from __future__ import annotations

import torch
from torch import Tensor

from methods.base import LinearUnit
from methods.engine.ops.choose import Kernels, use_triton
from methods.engine.ops.linear import estimate
from methods.engine.ops.triton.types import Partition, Routed


def route_and_forecast(
    x_ND: Tensor,
    residual_ND: Tensor,
    valid_N: Tensor,
    linear: LinearUnit,
    threshold: Tensor,
    *,
    tokens: int,
    reserved_N: Tensor | None = None,
    kernels: Kernels = "auto",
) -> Routed:
    """Decide for each token, and add the forecast to the residual of those that are bypassed.

    The score is accumulated in float32. The forecast's products take x and the float32 weights in
    TF32 if x is half precision, exactly otherwise; the residual is rounded once.

    Args:
        x_ND: the unit's normalised input, that of the router too.
        residual_ND: changed in place at bypassed tokens; padding and executed ones are untouched.
        valid_N: bool, False for padding.
        threshold: 0-dim; minus infinity executes all, infinity none.
        tokens: T, for the counts of each sequence.
        reserved_N: bool, tokens that execute whatever their score; None for none.
    """
    if use_triton(kernels, x_ND):
        from methods.engine.ops.triton.route_kernel import launch_route

        return launch_route(
            x_ND, residual_ND, valid_N, linear, threshold, None, tokens, reserved_N=reserved_N
        )
    scores_N = x_ND.float() @ linear.score_D + linear.offset
    execute_N = scores_N > threshold
    execute_N = (execute_N if reserved_N is None else execute_N | reserved_N) & valid_N
    rows = forecast_bypassed(
        x_ND, residual_ND, valid_N, execute_N, linear, tokens=tokens, kernels="torch"
    )
    return Routed(scores_N, execute_N, rows)


def forecast_bypassed(
    x_ND: Tensor,
    residual_ND: Tensor,
    valid_N: Tensor,
    execute_N: Tensor,
    linear: LinearUnit | None,
    *,
    tokens: int,
    kernels: Kernels = "auto",
) -> Partition:
    """`route_and_forecast` for decisions that are made elsewhere (routers of another form)."""
    if use_triton(kernels, x_ND):
        from methods.engine.ops.triton.route_kernel import launch_route

        return launch_route(x_ND, residual_ND, valid_N, linear, None, execute_N, tokens).rows
    execute_N = execute_N & valid_N
    found_ND = None if linear is None else estimate(linear, x_ND)
    if found_ND is not None:
        away_N = execute_N | ~valid_N
        residual_ND += found_ND.to(residual_ND.dtype).masked_fill(away_N[:, None], 0)
    return partition_reference(execute_N.view(-1, tokens), valid_N.view(-1, tokens))


def partition(execute_BT: Tensor, valid_BT: Tensor, *, kernels: Kernels = "auto") -> Partition:
    """Order a batch stably into executed, bypassed and padding tokens.

    Args:
        execute_BT: bool; a token is executed where this and `valid_BT` are true.
        valid_BT: bool, False for padding.
    """
    if not use_triton(kernels, execute_BT):
        return partition_reference(execute_BT, valid_BT)
    from methods.engine.ops.triton.partition_kernel import launch_partition, new_partition

    rows = new_partition(execute_BT.numel(), len(execute_BT), execute_BT.device)
    launch_partition(execute_BT, valid_BT, rows)
    return rows


def partition_reference(execute_BT: Tensor, valid_BT: Tensor) -> Partition:
    """`partition` in PyTorch, without waiting for the device."""
    execute_BT = execute_BT & valid_BT
    kind_N = torch.where(execute_BT, 0, torch.where(valid_BT, 1, 2)).flatten()
    counts_B = execute_BT.sum(1)
    executed = counts_B.sum()
    return Partition(
        index_N=torch.argsort(kind_N, stable=True),
        executed=executed,
        bypassed=valid_BT.sum() - executed,
        counts_B=counts_B,
        starts_B=counts_B.cumsum(0) - counts_B,
    )
