"""Small problems, small tiles: the interpreter runs one program after the other in NumPy."""

from __future__ import annotations

import pytest
import torch

from methods.engine.ops.choose import interpreting
from methods.engine.ops.triton import attend_rows_kernel, linear_rows_kernel
from methods.engine.ops.triton.jit import Tiles

SMALL = (Tiles(16, 16, 16, 4, 2),)


@pytest.fixture(scope="session")
def device() -> str:
    return "cpu" if interpreting() else "cuda"


@pytest.fixture(scope="session")
def small_tiles():
    """Every edge of a tile is met by a problem of a few dozen rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_rows_kernel, "tile_choices", lambda *_: SMALL)
        patch.setattr(attend_rows_kernel, "PREFILL", SMALL)
        patch.setattr(attend_rows_kernel, "DECODE", SMALL)
        yield


TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal to the tolerance of their dtype."""
    tolerance = TOLERANCE[found.dtype]
    return torch.allclose(found, expected, atol=tolerance, rtol=tolerance)


def draw(*shape: int, seed: int, dtype=torch.float32, device: str = "cpu") -> torch.Tensor:
    """Normal numbers, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device, dtype)


def masks(batch: int, tokens: int, share: float, seed: int, device: str = "cpu"):
    """execute_BT and valid_BT, left padded by up to half; a share of 0 or 1 is exact."""
    generator = torch.Generator().manual_seed(seed)
    execute = torch.rand(batch, tokens, generator=generator) < share
    pads = torch.randint(0, tokens // 2 + 1, (batch,), generator=generator)
    valid = torch.arange(tokens) >= pads[:, None]
    return execute.to(device), valid.to(device)
