"""Weights that lie off the device that computes with them, fetched where something reads them.

accelerate's hooks load an offloaded module's weights for the time of its `forward`. The engine's
paths also read weights without calling their module. While a module is materialised, a weight is
fetched when it is first read, by whatever path, and stays until it is released: each comes once,
and one that no path reads (of a unit that every token bypasses) never does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from accelerate.hooks import AlignDevicesHook


def hooks_of(module: nn.Module) -> Sequence[AlignDevicesHook]:
    """List the hooks with which accelerate moves this module's inputs or weights."""
    found = getattr(module, "_hf_hook", None)
    if found is None:
        return ()
    from accelerate.hooks import AlignDevicesHook

    return [h for h in getattr(found, "hooks", (found,)) if isinstance(h, AlignDevicesHook)]


def offloading(module: nn.Module) -> AlignDevicesHook | None:
    """Find the hook that fetches the module's own weights; None where they are in place."""
    return next((hook for hook in hooks_of(module) if hook.offload), None)


def device_named(name: int | str | torch.device) -> torch.device:
    """Resolve a device as accelerate names it, where a number is a CUDA device."""
    return torch.device("cuda", name) if isinstance(name, int) else torch.device(name)


class OnDemand(dict[str, Any]):
    """A module's parameters, of which each is fetched when it is first read.

    Args:
        held: what the module has, on the meta device.
        fetch: gives the tensor of a name, on the device that computes.
    """

    def __init__(self, held: dict[str, Any], fetch: Callable[[str], Tensor]) -> None:
        super().__init__(held)
        self.fetch = fetch
        self.here: dict[str, nn.Parameter] = {}

    def __getitem__(self, name: str) -> Any:
        if super().__getitem__(name) is None:
            return None
        if name not in self.here:
            self.here[name] = nn.Parameter(self.fetch(name), requires_grad=False)
        return self.here[name]


class Offloaded:
    """One module whose weights are offloaded; materialised between `begin` and `end`."""

    def __init__(self, module: nn.Module, hook: AlignDevicesHook) -> None:
        self.module, self.hook = module, hook
        self.device = device_named(hook.execution_device)
        self.own = OnDemand({}, self.fetch)
        self._before: tuple[dict[str, Any], Any] | None = None

    def fetch(self, name: str) -> Tensor:
        """Copy the weight, wherever it lies, to the device that computes."""
        assert self.hook.weights_map is not None
        weight: Tensor = self.hook.weights_map[name]
        return weight.to(self.device)

    def begin(self) -> None:
        """Let reads fetch, and calls run the module's own forward on what they fetch."""
        module: Any = self.module
        self._before = module._parameters, module.__dict__.get("forward")
        self.own = OnDemand(module._parameters, self.fetch)
        module.__dict__["_parameters"] = self.own
        module.__dict__["forward"] = module._old_forward

    def release(self) -> None:
        """Forget what was fetched; a later read fetches again."""
        self.own.here.clear()

    def end(self) -> None:
        """Put parameters and forward back as they were."""
        assert self._before is not None
        self.release()
        parameters, forward = self._before
        self.module.__dict__["_parameters"] = parameters
        self.module.__dict__["forward"] = forward


def offloaded_in(module: nn.Module) -> list[Offloaded]:
    """List the module and those below it whose weights lie elsewhere."""
    found = ((part, offloading(part)) for part in module.modules())
    return [Offloaded(part, hook) for part, hook in found if hook is not None]


def materialised(module: nn.Module) -> AbstractContextManager[None]:
    """Let the module's weights be read inside the block, wherever they lie."""
    return all_materialised(offloaded_in(module))


@contextmanager
def all_materialised(parts: Iterable[Offloaded]) -> Iterator[None]:
    """Materialise all of them inside the block."""
    begun: list[Offloaded] = []
    try:
        for part in parts:
            part.begin()
            begun.append(part)
        yield
    finally:
        for part in reversed(begun):
            part.end()


def fetched_again(parts: Sequence[Offloaded]) -> AbstractContextManager[Any]:
    """Let autograd keep where to fetch a weight again for the backward pass, not the weight.

    So a pass with gradient holds the weights of one layer, not of all.
    """

    def pack(kept: Tensor) -> Any:
        place = kept.untyped_storage().data_ptr()
        for part in parts:
            for name, weight in part.own.here.items():
                if weight.untyped_storage().data_ptr() == place:
                    view = kept.size(), kept.stride(), int(kept.storage_offset())
                    return partial(_view_again, part, name, view)
        return kept

    def unpack(packed: Any) -> Tensor:
        found: Tensor = packed() if isinstance(packed, partial) else packed
        return found

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _view_again(part: Offloaded, name: str, view: tuple[Any, Any, int]) -> Tensor:
    return part.fetch(name).as_strided(*view)


def stored(model: nn.Module, name: str, held: Tensor) -> Tensor:
    """Read the tensor of a dotted name, from where it lies if it is offloaded."""
    if held.device.type != "meta":
        return held
    owner, _, own_name = name.rpartition(".")
    hook = offloading(model.get_submodule(owner))
    assert hook is not None and hook.weights_map is not None, name
    found: Tensor = hook.weights_map[own_name]
    return found
