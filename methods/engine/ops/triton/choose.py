"""Which implementation of an operation runs."""

from __future__ import annotations

import importlib.util
import os
from typing import Literal, get_args

from torch import Tensor

Kernels = Literal["auto", "compiled", "triton", "torch"]
SETTINGS = get_args(Kernels)


def interpreting() -> bool:
    """True if Triton's interpreter is asked for: kernels then run on the CPU, slowly."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def use_triton(setting: Kernels, tensor: Tensor) -> bool:
    """Whether an operation on `tensor` runs its Triton kernel.

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
