"""Train one point in several processes, one per device, as `accelerate launch` starts them.

Rows of a micro-batch are dealt out, gradients and rates are summed; everything else (fits,
calibration, evaluation) every process does alike, and only the first one writes. What a method
trains is small, so one sum over its gradients replaces a wrapper of the whole model. In a process
that nobody launched this way, every function here does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from runners.runtime.processes import is_main_process, world_size

T = TypeVar("T")

PATIENCE = timedelta(hours=12)
"""How long a process waits for the others: the first one may wait for another sweep's stage."""


def join(device: str) -> None:
    """Meet the other processes, once; gloo on the CPU, NCCL on GPUs (accelerate decides).

    Args:
        device: of the config; `cpu` keeps off the GPUs.
    """
    if world_size() == 1 or distributed.is_initialized():
        return
    from accelerate import PartialState

    PartialState(cpu=device == "cpu" or not torch.cuda.is_available(), timeout=PATIENCE)


def is_distributed() -> bool:
    """Whether this process has met others."""
    return distributed.is_available() and distributed.is_initialized()


def local_rows(count: int) -> slice:
    """Those of `count` rows that this process passes through the model."""
    if not is_distributed():
        return slice(0, count)
    rank, world = distributed.get_rank(), distributed.get_world_size()
    return slice(count * rank // world, count * (rank + 1) // world)


def broadcast_object(find: Callable[[], T]) -> T:
    """Give all processes what `find` returns in the first one."""
    if not is_distributed():
        return find()
    found: list[Any] = [find() if is_main_process() else None]
    distributed.broadcast_object_list(found, src=0)
    value: T = found[0]
    return value


def broadcast_module(module: nn.Module) -> None:
    """Give every process the first one's parameters and buffers."""
    if not is_distributed():
        return
    for tensor in module.state_dict().values():
        held = tensor.to(_device()).contiguous()
        distributed.broadcast(held, src=0)
        tensor.copy_(held)


def all_reduce_max(value: int) -> int:
    """The largest of all processes' values."""
    if not is_distributed():
        return value
    held = torch.tensor(value, device=_device())
    distributed.all_reduce(held, op=distributed.ReduceOp.MAX)
    return int(held.item())


def all_reduce(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over all processes, in one transfer per dtype."""
    if not is_distributed():
        return
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        same = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.reshape(-1) for tensor in same])
        distributed.all_reduce(flat)
        for tensor, summed in zip(same, flat.split([t.numel() for t in same]), strict=True):
            tensor.copy_(summed.view_as(tensor))


def shared_gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Gradients to sum: those that any process has; zeros where this one has none."""
    if is_distributed():
        held = torch.tensor([float(p.grad is not None) for p in parameters], device=_device())
        distributed.all_reduce(held)
        for parameter, count in zip(parameters, held.tolist(), strict=True):
            if count and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
    return [p.grad for p in parameters if p.grad is not None]


def _device() -> torch.device:
    nccl = distributed.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
