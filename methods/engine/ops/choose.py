"""Choose what runs the engine's operations: Triton kernels, compiled loops or PyTorch."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from methods.engine.ops.cpu.build import reason_without
from methods.engine.ops.cpu.compiled import CompiledRowOps
from methods.engine.ops.cpu.tiled import TiledRowOps
from methods.engine.ops.row_ops import RowOps

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Kernels = Literal["auto", "compiled", "triton", "torch"]
SETTINGS = get_args(Kernels)


def interpreting() -> bool:
    """True if Triton's interpreter is asked for: kernels then run on the CPU, slowly."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def use_triton(setting: Kernels, tensor: Tensor) -> bool:
    """Decide whether an operation on `tensor` runs its Triton kernel.

    Args:
        setting: `auto` takes the kernel for a CUDA tensor where Triton is installed.
        tensor: any argument of the operation.

    Raises:
        ValueError: unknown setting, or `triton` where no kernel can run.
    """
    if setting not in SETTINGS:
        raise ValueError(f"kernels must be one of {', '.join(SETTINGS)}, not {setting!r}")
    if setting in ("torch", "compiled") or (setting == "auto" and not tensor.is_cuda):
        return False
    installed = importlib.util.find_spec("triton") is not None
    possible = installed and (tensor.is_cuda or interpreting())
    if setting == "triton" and not possible:
        missing = "an accelerator (CUDA)" if installed else "the package triton"
        raise ValueError(f"kernels=triton needs {missing}; kernels=auto runs without")
    return possible


def loops_for(dtype: torch.dtype) -> type[CompiledRowOps]:
    """The compiled loops of a precision; those of float32 for one that has none."""
    return TiledRowOps if dtype == torch.bfloat16 else CompiledRowOps


def row_ops(setting: Kernels, model: PreTrainedModel) -> RowOps:
    """Choose the row-wise operations for a model.

    Args:
        setting: `auto` takes compiled loops on a CPU, if they can be compiled: for float32, and
            for bfloat16 where the processor has AMX.

    Raises:
        ValueError: `compiled`, and they cannot.
    """
    loops = loops_for(model.dtype)
    if setting == "compiled":
        if reason := reason_without(loops.dtype):
            raise ValueError(f"kernels=compiled: {reason}; kernels=auto runs without")
        return loops()
    # weights that are offloaded to disk have the device meta until they are asked for
    on_host = any(weight.device.type in ("cpu", "meta") for weight in model.parameters())
    wanted = setting == "auto" and on_host and model.dtype == loops.dtype
    return loops() if wanted and reason_without(loops.dtype) is None else RowOps()
