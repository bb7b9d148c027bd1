"""The real compiler and ptxas on every kernel, for an H100, with the arguments of real models."""

from __future__ import annotations

import pytest
import torch

from tests.methods.engine.ops.triton.launches import LLAMA_8B, SMOLLM2, launch_all

pytest.importorskip("triton")
from tests.methods.engine.ops.triton.compiler import SHARED_BYTES, compiling

REGISTERS = 65536
"""Of a multiprocessor; a program that asks for more does not start."""
SPILLED = 16
"""Bytes of a thread, where there is one choice of tiles; of several the tuner takes the fastest."""
TIMED = {"rows_kernel", "attend_kernel"}

KERNELS = {
    "attend_kernel",
    "decide_kernel",
    "partition_kernel",
    "project_kernel",
    "rows_kernel",
}


def compiled(model, dtype, choice=0, variants=True):
    with compiling(choice) as done:
        launch_all(model, dtype, variants)
    assert {kernel.name for kernel in done} >= KERNELS
    for kernel in done:
        assert kernel.shared <= SHARED_BYTES, (kernel.name, kernel.shared)
        threads = 32 * kernel.options.get("num_warps", 4)
        assert kernel.registers * threads <= REGISTERS, (kernel.name, kernel.registers, threads)
        spilled = 0 if kernel.name in TIMED else kernel.spilled
        assert spilled <= SPILLED, (kernel.name, kernel.options, spilled)
        assert max(kernel.grid[1:], default=1) < 2**16, kernel.name
    return done


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 4, 48, 2048])
@pytest.mark.parametrize(
    ("model", "choice"), [*((LLAMA_8B, choice) for choice in range(6)), (SMOLLM2, 0)]
)
def test_every_tile(model, tokens, choice):
    sizes = model._replace(tokens=tokens, batch=1 if tokens < 2048 else model.batch, slots=4096)
    compiled(sizes, torch.bfloat16, choice, variants=choice == 0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes(dtype):
    compiled(SMOLLM2, dtype)


@pytest.mark.slow
def test_prefill_uses_the_tensor_cores_of_hopper():
    done = compiled(LLAMA_8B, torch.bfloat16)
    for name in ("rows_kernel", "attend_kernel"):
        assert all("wgmma" in kernel.ptx for kernel in done if kernel.name == name), name


def test_long_cache_is_reduced():
    """The kernels of one decode step over a long cache, odd sizes: what compiles quickest."""
    sizes = SMOLLM2._replace(batch=1, tokens=1, slots=4096)
    names = {kernel.name for kernel in compiled(sizes, torch.bfloat16, variants=False)}
    assert "reduce_kernel" in names
