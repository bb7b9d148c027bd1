"""KV policy `forecast`: a bypassed token's keys and values are estimates, executed ones are real.

The projections `k_proj` and `v_proj` of routed layers are replaced inside the block: they compute
the rows of executed tokens and take the method's estimate for the others, before rotation and key
norm, so that every path and every cache of the engine sees ordinary keys. What this saves is the
projections; a cache that holds the method's code of a bypassed token instead, and expands it when
it is read, holds as many numbers as `SiteCost.stored` says (`kv_bytes_ratio`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from methods.base import Method, Site
from methods.engine.decoder.adapter import layers_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAMES = ("k_proj", "v_proj")


class Blended(nn.Module):
    """A projection that runs for executed tokens; the rest get a slice of the estimate."""

    def __init__(
        self,
        projection: nn.Module,
        execute: Callable[[], Tensor | None],
        estimate: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        # in a tuple: the model's weights are no part of this module
        self._projection, self._execute, self._estimate = (projection,), execute, estimate

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, key-value heads * head size]."""
        projection, execute_BT = self._projection[0], self._execute()
        if execute_BT is None:
            real: Tensor = projection(x_BTD)
            return real
        estimated = self._estimate(x_BTD).to(x_BTD.dtype)
        index = execute_BT.flatten().nonzero().squeeze(1)
        rows = projection(x_BTD.flatten(0, 1).index_select(0, index))
        return estimated.flatten(0, 1).index_copy(0, index, rows).view_as(estimated)


@contextmanager
def forecast_keys(
    model: PreTrainedModel, method: Method, decided: Callable[[int], Tensor | None]
) -> Iterator[None]:
    """Replace the projections inside the block if the method's KV policy asks for it.

    Args:
        decided: execute_BT of a layer's attention in this forward; None runs the layer densely.
    """
    if method.kv_policy != "forecast":
        yield
        return
    places: list[tuple[Any, str, nn.Module]] = []
    try:
        for site in method.sites():
            if site.kind != "attention":
                continue
            attention: Any = layers_of(model)[site.layer].attention
            for half, name in enumerate(NAMES):
                projection = getattr(attention, name)
                places.append((attention, name, projection))
                setattr(attention, name, _blended(projection, method, site, half, decided))
        yield
    finally:
        for attention, name, projection in places:
            setattr(attention, name, projection)


def _blended(
    projection: nn.Module,
    method: Method,
    site: Site,
    half: int,
    decided: Callable[[int], Tensor | None],
) -> Blended:
    def estimate(x_BTD: Tensor) -> Tensor:
        both = method.forecast_keys(site, x_BTD)
        if both is None:
            raise ValueError(f"{type(method).__name__} has no forecast of keys and values")
        return both.chunk(2, dim=-1)[half]

    return Blended(projection, lambda: decided(site.layer), estimate)


def projected_keys(attention: Any, x_ND: Tensor) -> Tensor:
    """K and V of these tokens before rotation and key norm, [N, 2 * K heads * head size]."""
    return torch.cat([getattr(attention, name)(x_ND) for name in NAMES], dim=-1)
