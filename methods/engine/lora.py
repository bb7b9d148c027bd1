"""Low-rank adapters of the backbone (peft), present in a model only while it is routed.

peft wraps projections; the wrapped ones stand in the model inside `applied` and the untouched ones
outside it, so no base weight is ever written and the dense model (a teacher, the next job of a
sweep) is the original bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from methods.base import LoraSpec, Method
from methods.engine.decoder.adapter import layers_of
from methods.engine.decoder.families import require_family
from methods.engine.decoder.offload import stand_ins
from methods.engine.decoder.placement import placed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "default"
"""peft's name of the only adapter."""


class Place(NamedTuple):
    """One adapted projection."""

    name: str
    """Dotted path in the model."""
    parent: nn.Module
    child: str
    base: nn.Linear
    wrapped: Any
    """peft's layer around `base`."""


class Adapter(nn.Module):
    """The factors of every adapted projection, float32: the only tensors it owns.

    Args:
        spec: as asked for.
        places: projections with peft's layers, not in the model now.
        peft_config: peft's form of `spec`.
    """

    def __init__(self, spec: LoraSpec, places: list[Place], peft_config: Any) -> None:
        super().__init__()
        self.spec, self.places, self.peft_config = spec, tuple(places), peft_config
        self.merged = False
        """True adds the product of the factors to a copy of each weight: same numbers, no extra
        products in the forward, the memory of one more copy. Not for training."""
        self.down = nn.ParameterDict()
        self.up = nn.ParameterDict()
        for place in places:
            layer, key = place.wrapped, place.name.replace(".", "/")
            for factor in (layer.lora_A[NAME], layer.lora_B[NAME]):
                factor.float()
            self.down[key] = layer.lora_A[NAME].weight
            self.up[key] = layer.lora_B[NAME].weight
        self.eval()

    def train(self, mode: bool = True) -> Adapter:
        """Dropout on or off."""
        super().train(mode)
        for place in self.places:
            place.wrapped.train(mode)
            place.base.eval()
        return self

    def peft_tensors(self) -> dict[str, Tensor]:
        """The factors under the names of peft's `adapter_model.safetensors`."""
        named = {}
        for place in self.places:
            key = place.name.replace(".", "/")
            named[f"base_model.model.{place.name}.lora_A.weight"] = self.down[key]
            named[f"base_model.model.{place.name}.lora_B.weight"] = self.up[key]
        return named

    def current(self, place: Place) -> nn.Module:
        """What stands at a place while the adapter is applied."""
        wrapped: nn.Module = place.wrapped
        return _merged(place) if self.merged else wrapped


def attach_lora(
    model: PreTrainedModel, method: Method, spec: LoraSpec, *, seed: int = 0
) -> Adapter:
    """Give the method an adapter (once; A random from `seed`, B zero, so the start is neutral).

    Raises:
        ValueError: the method has an adapter of another shape, or a projection is missing.
    """
    if method.adapter is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            method.adapter = Adapter(spec, *_wrap(model, spec))
    adapter = method.adapter
    assert isinstance(adapter, Adapter)
    if adapter.spec != spec:
        raise ValueError(f"this method already has adapters {adapter.spec}, not {spec}")
    return adapter


@contextmanager
def applied(adapter: nn.Module | None) -> Iterator[None]:
    """The adapted projections stand in the model inside the block; None changes nothing."""
    if adapter is None:
        yield
        return
    assert isinstance(adapter, Adapter)
    try:
        for place in adapter.places:
            setattr(place.parent, place.child, adapter.current(place))
        yield
    finally:
        for place in adapter.places:
            setattr(place.parent, place.child, place.base)


@contextmanager
def suspended(adapter: nn.Module | None) -> Iterator[None]:
    """The untouched projections again, inside a block of `applied`."""
    assert adapter is None or isinstance(adapter, Adapter)
    places = () if adapter is None else adapter.places
    inside = [getattr(place.parent, place.child) for place in places]
    try:
        for place in places:
            setattr(place.parent, place.child, place.base)
        yield
    finally:
        for place, module in zip(places, inside, strict=True):
            setattr(place.parent, place.child, module)


def describe(adapter: nn.Module | None) -> dict[str, Any] | None:
    """The spec as JSON values; None without an adapter."""
    if adapter is None:
        return None
    assert isinstance(adapter, Adapter)
    return {**asdict(adapter.spec), "targets": list(adapter.spec.targets)}


def _wrap(model: PreTrainedModel, spec: LoraSpec) -> tuple[list[Place], Any]:
    """peft's layers for every target, taken out of the model again, and peft's configuration."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    family = require_family(model.config.model_type)
    wanted = [family.projection.format(role) for role in spec.targets]
    for part in layers_of(model):
        found = {name for unit in (part.attention, part.mlp) for name, _ in unit.named_children()}
        if missing := sorted(set(wanted) - found):
            raise ValueError(f"{model.config.model_type} has no projection {', '.join(missing)}")
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=wanted,
        task_type="CAUSAL_LM",
    )
    with stand_ins(model) if placed(model) else nullcontext():
        inject_adapter_in_model(config, model, adapter_name=NAME)
    del model.peft_config
    places = []
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            path, _, child = name.rpartition(".")
            base = module.get_base_layer()
            assert isinstance(base, nn.Linear)
            places.append(Place(name, model.get_submodule(path), child, base, module))
    for place in places:
        setattr(place.parent, place.child, place.base)
    return places, config


def _merged(place: Place) -> nn.Module:
    """A shallow copy of the base projection whose weight holds the update."""
    merged = copy.copy(place.base)
    weight = place.base.weight
    update = place.wrapped.get_delta_weight(NAME).detach()
    total = (weight.float() + update.float()).to(weight.dtype)
    merged._parameters = {
        **place.base._parameters,
        "weight": nn.Parameter(total, requires_grad=False),
    }
    return merged
