"""Kernels run on a GPU, or where Triton was told to interpret before its first import."""

from __future__ import annotations

import torch

from methods.engine.ops.choose import interpreting

collect_ignore = [] if interpreting() or torch.cuda.is_available() else ["interpreted"]
