"""Models whose layers lie on several devices, or off them: what accelerate's `device_map` does.

Its hooks move a layer's inputs to the layer's device before the layer's `forward`; the engine puts
its own forward there, and does the same around it. A model in one place has no hook, is asked once
when it is routed, and runs as if this file did not exist.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from methods.base import Method
from methods.engine.decoder.families import LayerParts, layers_of
from methods.engine.decoder.inputs import ForwardCall
from methods.engine.decoder.offload import (
    all_materialised,
    device_named,
    fetched_again,
    hooks_of,
    offloaded_in,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

M = TypeVar("M", bound=Method)


def placed(model: nn.Module) -> bool:
    """True if accelerate has spread the model, or keeps a part of it off the device."""
    return hasattr(model, "_hf_hook")


def device_of(module: nn.Module) -> torch.device:
    """The device that computes the module, or its first part."""
    for part in module.modules():
        for hook in hooks_of(part):
            if hook.execution_device is not None:
                return device_named(hook.execution_device)
    return next(module.parameters()).device


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids go: the device of the embeddings."""
    if not placed(model):
        return next(model.parameters()).device
    return device_of(model.get_input_embeddings())


def layer_devices(model: PreTrainedModel) -> list[torch.device]:
    """The device that computes each decoder layer."""
    return [device_of(part.layer) for part in layers_of(model)]


def spread(model: PreTrainedModel) -> bool:
    """True if layers are computed on more than one device."""
    return placed(model) and len(set(layer_devices(model))) > 1


class Placement:
    """Where a placed model's layers compute, and what they have to fetch."""

    def __init__(self, parts: Sequence[LayerParts]) -> None:
        self.devices = [device_of(part.layer) for part in parts]
        self.offloaded = [offloaded_in(part.layer) for part in parts]

    def materialised(self) -> AbstractContextManager[None]:
        """Fetch the weights of layers as they are read inside the block."""
        return all_materialised(part for layer in self.offloaded for part in layer)

    def run(
        self,
        index: int,
        forward: Callable[..., Tensor],
        call: ForwardCall,
        args: Any,
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Run a layer's forward on the layer's device, and release its weights at the end."""
        device, offloaded = self.devices[index], self.offloaded[index]
        call.move(device)
        args, kwargs = moved(args, device), moved(kwargs, device)
        again = fetched_again(offloaded) if offloaded and torch.is_grad_enabled() else nullcontext()
        try:
            with again:
                return forward(*args, **kwargs)
        finally:
            for part in offloaded:
                part.release()


def moved(value: Any, device: torch.device) -> Any:
    """Tensors in tuples and dictionaries on a device; what needs no move is the same object.

    A cache is none of these: its layers lie where their keys were made.
    """
    if isinstance(value, Tensor):
        return value.to(device)
    if type(value) is tuple:
        items = tuple(moved(item, device) for item in value)
        same = all(new is old for new, old in zip(items, value, strict=True))
        return value if same else items
    if type(value) is dict:
        return {key: moved(item, device) for key, item in value.items()}
    return value


def place_on_devices(model: PreTrainedModel, method: M) -> M:
    """Put what the method has for a layer on the device of that layer.

    Raises:
        ValueError: layers are on several devices, and the method shares a module between them.
    """
    devices = layer_devices(model) if placed(model) else [input_device(model)]
    if len(set(devices)) == 1:
        return method.to(devices[0])
    own = {site.key: devices[site.layer] for site in method.sites()}
    for name, _ in method.named_parameters():
        # what is no parameter stays on the host: a threshold goes with tensors of every device
        if not own.keys() & name.split("."):
            raise ValueError(
                f"layers share {name.partition('.')[0]}, and lie on several devices: "
                "give all layers one device, with some on cpu or disk if it is too small"
            )
    for name, module in method.named_modules():
        site = name.rpartition(".")[2]
        if site in own:
            module.to(own[site])
    return method
