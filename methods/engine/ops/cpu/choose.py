"""Whether row-wise work runs as compiled loops."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from methods.engine.ops.cpu.build import reason_without
from methods.engine.ops.cpu.compiled import CompiledRowOps
from methods.engine.ops.row_ops import RowOps
from methods.engine.ops.triton.choose import Kernels

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def row_ops(setting: Kernels, model: PreTrainedModel) -> RowOps:
    """The operations for a model.

    Args:
        setting: `auto` takes compiled loops for float32 on a CPU, if they can be compiled.

    Raises:
        ValueError: `compiled`, and they cannot.
    """
    if setting == "compiled":
        if reason := reason_without():
            raise ValueError(f"kernels=compiled: {reason}; kernels=auto runs without")
        return CompiledRowOps()
    # weights that are offloaded to disk have the device meta until they are asked for
    on_host = any(weight.device.type in ("cpu", "meta") for weight in model.parameters())
    wanted = setting == "auto" and on_host and model.dtype == torch.float32
    if wanted and reason_without() is None:
        return CompiledRowOps()
    return RowOps()
