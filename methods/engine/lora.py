"""Low-rank adapters of the backbone, present in a model only while it is routed.

An adapted projection is the model's own module with another `forward`, so no base weight is ever
written and the dense model (a teacher, the next job of a sweep) is the original bit for bit. Saved
adapters are peft's: `PeftModel.from_pretrained` reads them.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from methods.base import LoraSpec, Method
from methods.engine.decoder.families import layers_of, require_family
from methods.engine.decoder.placement import device_of
from methods.engine.decoder.swap import Forward, SwappedForward, swapped_forwards, untouched

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Place(NamedTuple):
    """One adapted projection."""

    name: str
    """Dotted path in the model."""
    base: nn.Linear

    @property
    def key(self) -> str:
        """Name usable inside an `nn.ParameterDict`."""
        return self.name.replace(".", "/")


class LoraFactors(nn.Module):
    """The factors of every adapted projection, float32: the only tensors it owns.

    Args:
        spec: as asked for.
        places: the projections that they adapt.
    """

    def __init__(self, spec: LoraSpec, places: list[Place]) -> None:
        super().__init__()
        self.spec, self.places = spec, tuple(places)
        self.merged = False
        """True adds the product of the factors to a copy of each weight: same numbers, no extra
        products in the forward, the memory of one more copy. Not for training."""
        self.down = nn.ParameterDict()
        self.up = nn.ParameterDict()
        for place in places:
            base, device = place.base, device_of(place.base)
            # the draws of peft's layers, in their order and rounded as in the base model
            down = nn.Linear(base.in_features, spec.rank, bias=False)
            up = nn.Linear(spec.rank, base.out_features, bias=False)
            nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
            nn.init.zeros_(up.weight)
            for factors, layer in ((self.down, down), (self.up, up)):
                factors[place.key] = layer.to(device, base.weight.dtype).float().weight
        self.eval()

    def forward_of(self, place: Place) -> Forward:
        """The forward of a projection while the adapter is applied."""
        down, up = self.down[place.key], self.up[place.key]
        return (_Merged if self.merged else _Added)(self, place.base, down, up)

    def peft_tensors(self) -> dict[str, Tensor]:
        """The factors under the names of peft's `adapter_model.safetensors`."""
        named = {}
        for place in self.places:
            named[f"base_model.model.{place.name}.lora_A.weight"] = self.down[place.key]
            named[f"base_model.model.{place.name}.lora_B.weight"] = self.up[place.key]
        return named

    def peft_config(self) -> dict[str, Any]:
        """What peft writes to `adapter_config.json`."""
        from peft import LoraConfig

        config = LoraConfig(
            r=self.spec.rank,
            lora_alpha=self.spec.alpha,
            lora_dropout=self.spec.dropout,
            target_modules=sorted({place.name.rpartition(".")[2] for place in self.places}),
            task_type="CAUSAL_LM",
            inference_mode=True,
        )
        return config.to_dict()


class _Added(SwappedForward):
    """A projection's output plus alpha / rank * B A x, the sum in float32."""

    def __init__(self, factors: LoraFactors, base: nn.Linear, down: Tensor, up: Tensor) -> None:
        self.original, self.factors, self.down, self.up = base.forward, factors, down, up
        self.scaling = factors.spec.alpha / factors.spec.rank

    def __call__(self, x: Tensor) -> Tensor:
        out = self.original(x)
        kept = x.to(self.down.dtype)
        if self.factors.training and self.factors.spec.dropout:
            kept = functional.dropout(kept, self.factors.spec.dropout)
        update = functional.linear(functional.linear(kept, self.down), self.up) * self.scaling
        return (out + update).to(out.dtype)


class _Merged(SwappedForward):
    """A projection by a copy of its weight that holds the update."""

    def __init__(self, factors: LoraFactors, base: nn.Linear, down: Tensor, up: Tensor) -> None:
        update = (up @ down).detach() * (factors.spec.alpha / factors.spec.rank)
        self.original, self.base = base.forward, base
        self.weight = (base.weight.float() + update).to(base.weight.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.base.bias)


def attach_lora(
    model: PreTrainedModel, method: Method, spec: LoraSpec, *, seed: int = 0
) -> LoraFactors:
    """Give the method an adapter (once; A random from `seed`, B zero, so the start is neutral).

    Raises:
        ValueError: the method has an adapter of another shape, or a projection is missing.
    """
    if method.adapter is None:
        places = _places(model, spec)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            method.adapter = LoraFactors(spec, places)
    adapter = method.adapter
    assert isinstance(adapter, LoraFactors)
    if adapter.spec != spec:
        raise ValueError(f"this method already has adapters {adapter.spec}, not {spec}")
    return adapter


def applied(adapter: nn.Module | None) -> AbstractContextManager[None]:
    """Adapt the projections inside the block; None changes nothing."""
    if adapter is None:
        return nullcontext()
    assert isinstance(adapter, LoraFactors)
    return swapped_forwards((place.base, adapter.forward_of(place)) for place in adapter.places)


def suspended(adapter: nn.Module | None) -> AbstractContextManager[None]:
    """Run the untouched projections again, inside a block of `applied`."""
    if adapter is None:
        return nullcontext()
    assert isinstance(adapter, LoraFactors)
    return swapped_forwards((place.base, untouched(place.base)) for place in adapter.places)


def describe(adapter: nn.Module | None) -> dict[str, Any] | None:
    """The spec as JSON values; None without an adapter."""
    if adapter is None:
        return None
    assert isinstance(adapter, LoraFactors)
    return {**asdict(adapter.spec), "targets": list(adapter.spec.targets)}


def _places(model: PreTrainedModel, spec: LoraSpec) -> list[Place]:
    family = require_family(model.config.model_type)
    wanted = sorted({family.projection(role) for role in spec.targets})
    for part in layers_of(model):
        names = {name.rpartition(".")[2] for name, _ in part.layer.named_modules()}
        if missing := sorted(set(wanted) - names):
            raise ValueError(f"{model.config.model_type} has no projection {', '.join(missing)}")
    return [
        Place(name, module)
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in wanted and isinstance(module, nn.Linear)
    ]
