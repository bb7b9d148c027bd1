"""GPUs that are not there: tensors that compute on the host, and say which device they are on.

An operation on tensors of two devices fails as it would on real ones, so a test on any machine
sees whether everything was moved that had to be, and whether the numbers are right.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

HOST = torch.device("cpu")


class Pretend(Tensor):
    """A host tensor that claims to be on a GPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, device: Any = None, requires_grad: bool = False) -> Any:
        if isinstance(held, Pretend):  # what accelerate does to a parameter
            return held.detach().requires_grad_(requires_grad)
        made = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=device,
            requires_grad=requires_grad,
        )
        made.held = held
        return made

    def __repr__(self, **_: Any) -> str:
        return f"Pretend({self.held}, {self.device})"

    def tolist(self) -> Any:
        return self.held.tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return on_pretended(func, args, kwargs or {})


def on_pretended(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the host, and say that its result is where its arguments are."""
    flat, shape = tree_flatten((args, kwargs))
    asked = kwargs.get("device")
    target = None if asked is None else torch.device(asked)
    places = {t.device for t in flat if isinstance(t, Tensor) and (t.dim() or t.device != HOST)}
    first, name = first_place(flat, places), func.name()
    moves = name.startswith(("aten::_to_copy", "aten::copy_"))
    chooses = name.startswith("aten::index.Tensor") and places <= {first, HOST}
    if len(places) > 1 and not (moves or chooses):
        raise RuntimeError(f"{name}: tensors on {', '.join(map(str, places))}")
    place = target or first
    host = [HOST if isinstance(v, torch.device) else unwrapped(v) for v in flat]
    args, kwargs = tree_unflatten(host, shape)
    out = func(*args, **kwargs)
    if name.partition(".")[0].endswith("_") and isinstance(out, Tensor):
        return flat[0]
    if place == HOST:
        return out
    return tree_map(lambda v: Pretend(v, place) if isinstance(v, Tensor) else v, out)


def first_place(flat: list[Any], places: set[torch.device]) -> torch.device:
    """Of the first tensor that has dimensions, or is on a GPU."""
    for value in flat:
        if isinstance(value, Tensor) and value.device in places:
            return value.device
    return HOST


def unwrapped(value: Any) -> Any:
    return value.held if isinstance(value, Pretend) else value


class _Factories(TorchDispatchMode):
    """What is made on a GPU is made by the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return on_pretended(func, args, kwargs or {})


class _FromData(TorchFunctionMode):
    """`torch.tensor` fills its result below the level of operations: on the host, then moved."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is not torch.tensor or kwargs.get("device") is None:
            return func(*args, **kwargs)
        device = kwargs.pop("device")
        return func(*args, **kwargs).to(device)


class _Module(_DummyBackendModule):
    """What torch asks a backend: here, how many devices there are."""

    def device_count(self) -> int:
        return 2


@contextmanager
def pretended() -> Iterator[None]:
    """`pretend:0` and `pretend:1` are devices inside the block; once in a process."""
    _setup_privateuseone_for_python_backend("pretend", _Module())
    with _FromData(), _Factories(), sdpa_kernel(SDPBackend.MATH):
        yield
