"""KV policy `forecast`: a bypassed token's keys and values are estimates, executed ones are real.

Inside the block `k_proj` and `v_proj` of routed layers compute the rows of executed tokens and take
the method's estimate for the others, before rotation and key norm, so that every path and every
cache of the engine sees ordinary keys. What this saves is the projections; a cache that holds the
method's code of a bypassed token instead, and expands it when it is read, holds as many numbers as
`SiteCost.stored` says (`kv_bytes_ratio`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from methods.base import Method, Site
from methods.engine.decoder.families import layers_of
from methods.engine.decoder.swap import SwappedForward, swapped_forwards

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAMES = ("k_proj", "v_proj")


class _Blended(SwappedForward):
    """A projection that runs for executed tokens; the rest get their half of the estimate."""

    def __init__(
        self, module: nn.Module, half: int, execute: Callable[[], Tensor | None], estimate: Any
    ) -> None:
        self.original, self.half = module.forward, half
        self.execute, self.estimate = execute, estimate

    def __call__(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, key-value heads * head size]."""
        execute_BT = self.execute()
        if execute_BT is None:
            real: Tensor = self.original(x_BTD)
            return real
        estimated = self.estimate(x_BTD).chunk(2, dim=-1)[self.half].to(x_BTD.dtype)
        index = execute_BT.flatten().nonzero().squeeze(1)
        rows = self.original(x_BTD.flatten(0, 1).index_select(0, index))
        return estimated.flatten(0, 1).index_copy(0, index, rows).view_as(estimated)


def forecast_keys(
    model: PreTrainedModel, method: Method, decided: Callable[[int], Tensor | None]
) -> AbstractContextManager[None]:
    """Blend estimates into the projections inside the block, if the KV policy asks for it.

    Args:
        decided: execute_BT of a layer's attention in this forward; None runs the layer densely.
    """
    if method.kv_policy != "forecast":
        return nullcontext()
    parts = layers_of(model)
    require_apart(parts[0].attention)

    def blended(site: Site, half: int, module: nn.Module) -> _Blended:
        def estimate(x_BTD: Tensor) -> Tensor:
            both = method.forecast_keys(site, x_BTD)
            if both is None:
                raise ValueError(f"{type(method).__name__} has no forecast of keys and values")
            return both

        return _Blended(module, half, lambda: decided(site.layer), estimate)

    places = [
        (site, half, getattr(parts[site.layer].attention, name))
        for site in method.sites()
        if site.kind == "attention"
        for half, name in enumerate(NAMES)
    ]
    return swapped_forwards((place[2], blended(*place)) for place in places)


def projected_keys(attention: Any, x_ND: Tensor) -> Tensor:
    """K and V of these tokens before rotation and key norm, [N, 2 * K heads * head size]."""
    require_apart(attention)
    return torch.cat([getattr(attention, name)(x_ND) for name in NAMES], dim=-1)


def require_apart(attention: Any) -> None:
    """Refuse an attention whose keys and values have no projections of their own.

    Raises:
        ValueError: it has one for all three (Phi-3).
    """
    if not all(hasattr(attention, name) for name in NAMES):
        kind = type(attention).__name__
        raise ValueError(f"KV policy forecast needs k_proj and v_proj, which {kind} has not")
