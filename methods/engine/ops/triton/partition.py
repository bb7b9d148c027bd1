"""Executed tokens first: the order in which gathered kernels read a batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from methods.engine.ops.choose import Kernels, use_triton


class Partition(NamedTuple):
    """Places of a batch's tokens, executed ones first; everything int64, on the device."""

    index_N: Tensor
    """Places b * T + t: executed tokens in order, then bypassed ones, then padding."""
    executed: Tensor
    """0-dim: how many of `index_N` are executed."""
    bypassed: Tensor
    """0-dim: how many bypassed tokens follow them."""
    counts_B: Tensor
    """Executed tokens of each sequence."""
    starts_B: Tensor
    """Rank in `index_N` of each sequence's first executed token."""


def partition(execute_BT: Tensor, valid_BT: Tensor, *, kernels: Kernels = "auto") -> Partition:
    """Stable partition of a batch into executed, bypassed and padding tokens.

    Args:
        execute_BT: bool; a token is executed where this and `valid_BT` are true.
        valid_BT: bool, False for padding.
        kernels: implementation.
    """
    if not use_triton(kernels, execute_BT):
        return partition_reference(execute_BT, valid_BT)
    from methods.engine.ops.triton.partition_kernel import launch_partition

    return launch_partition(execute_BT, valid_BT)


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
