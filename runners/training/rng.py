"""The state of every random generator that training draws from."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

CUDA, TORCH = "random.cuda", "random.torch"


@dataclass(frozen=True)
class RandomState:
    """Generators of torch (the host's and the device's), Python and NumPy at one moment."""

    tensors: dict[str, Tensor]
    """uint8; torch's own form of its states."""
    python: Any
    numpy: Any

    @classmethod
    def take(cls, device: torch.device) -> RandomState:
        """As it is now; `device` counts if it is a CUDA device."""
        tensors = {TORCH: torch.get_rng_state()}
        if device.type == "cuda":
            tensors[CUDA] = torch.cuda.get_rng_state(device)
        return cls(tensors, random.getstate(), numpy.random.get_state())

    def put(self, device: torch.device) -> None:
        """Make every generator go on from here."""
        torch.set_rng_state(self.tensors[TORCH])
        if device.type == "cuda":
            torch.cuda.set_rng_state(self.tensors[CUDA], device)
        random.setstate(self.python)
        numpy.random.set_state(self.numpy)

    def to_dict(self) -> dict[str, Any]:
        """JSON form of what is no tensor."""
        version, words, gauss = self.python
        name, keys, *rest = self.numpy
        return {
            "python": [version, list(words), gauss],
            "numpy": [name, keys.tolist(), *rest],
        }

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], parts: Mapping[str, Any]) -> RandomState:
        """From `to_dict` and the tensors."""
        version, words, gauss = parts["python"]
        name, keys, *rest = parts["numpy"]
        return cls(
            {key: tensors[key] for key in (TORCH, CUDA) if key in tensors},
            (version, tuple(words), gauss),
            (name, numpy.array(keys, dtype=numpy.uint32), *rest),
        )
