"""Compiles what an operation launches, for a GPU that need not be there.

Triton compiles at the first launch, from the types and values of the arguments. Here a launch
stops after that step, so that the real compiler and ptxas see each kernel exactly as the launch
on an H100 would specialise it, with meta tensors of any size.
"""

from __future__ import annotations

import inspect
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from methods.engine.ops import choose
from methods.engine.ops.triton.jit import Tuner

H100 = GPUTarget("cuda", 90, 32)
SHARED_BYTES = 227 * 1024
"""Shared memory that one program may use on an H100."""
TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.bool: "i1",
}


class Compiled(NamedTuple):
    """One specialisation of one kernel."""

    name: str
    ptx: str
    shared: int
    registers: int
    """Of a thread."""
    spilled: int
    """Bytes of a thread that did not fit its registers."""
    grid: tuple[int, ...]
    options: dict[str, int]


def specialise(kernel: JITFunction, args: tuple[Any, ...], named: dict[str, Any]) -> ASTSource:
    """Types, constants and alignment of a launch's arguments, by Triton's rules."""
    signature, constants, attributes = {}, {}, {}
    bound = inspect.signature(kernel.fn).bind(*args, **named).arguments
    for place, parameter in enumerate(kernel.params):
        value = bound[parameter.name]
        free = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            if not parameter.is_constexpr and value is not None and not free:
                signature[parameter.name] = "i32"
                continue
            signature[parameter.name] = "constexpr"
            constants[(place,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            aligned = value.storage_offset() * value.element_size() % 16 == 0
            if aligned and free:
                attributes[(place,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and free:
                attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32"
    return ASTSource(kernel, signature, constants, attributes)


@contextmanager
def launching(run: Callable[..., Any] | None = None, choice: int = 0) -> Iterator[list[Any]]:
    """Inside, `kernels="triton"` is allowed for any tensor and a launch calls `run` instead.

    Each operation takes its `choice`-th tiles. Yields the launched kernels, in order.
    """
    launched: list[Any] = []

    def record(kernel: JITFunction, *args: Any, **named: Any) -> None:
        launched.append(kernel if run is None else run(kernel, *args, **named))

    def pick(_: Tuner, key: Any, tiles: Any, trial: Any) -> Any:
        return tiles[min(choice, len(tiles) - 1)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choose, "interpreting", lambda: True)
        patch.setattr(JITFunction, "run", record)
        patch.setattr(Tuner, "pick", pick)
        yield launched


def compile_launch(
    kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **named: Any
) -> Compiled:
    """Compile what this launch would run."""
    options = {k: named.pop(k) for k in ("num_warps", "num_stages") if k in named}
    binary = triton.compile(specialise(kernel, args, named), target=H100, options=options)
    name = kernel.fn.__name__
    usage = resource_usage(binary.asm["cubin"])
    shared = binary.metadata.shared
    return Compiled(name, binary.asm["ptx"], shared, *usage, grid, options)


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes of a thread, as the binary of the kernel says."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        said = subprocess.check_output([tool, "-res-usage", file.name], text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert found, said
    return int(found[1]), int(found[2])


def compiling(choice: int = 0) -> AbstractContextManager[list[Compiled]]:
    """`launching` that yields what was compiled."""
    return launching(compile_launch, choice)
