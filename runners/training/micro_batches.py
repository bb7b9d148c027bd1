"""A micro-batch in parts, for want of memory: the gradient of the whole, part by part.

Means over tokens add up by themselves. Two things do not, and are seen to here: a loss that bends
in an execute rate (a penalty on the mean is not the mean of penalties), and random draws.

Shapes: B rows of the whole, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from methods.base import RoutedView, Site
from runners.runtime.distributed import all_reduce
from runners.training.rng import RandomState

ATEN = torch.ops.aten


@dataclass(frozen=True)
class Part:
    """Some rows of a micro-batch."""

    ids_BT: Tensor
    share: float
    """Of the whole's rows."""
    draws: RowDraws
    start: RandomState
    """Generators before the whole's first draw."""

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Draw in the block what these rows would get if the whole ran at once."""
        self.start.put(self.ids_BT.device)
        with self.draws:
            yield


def parts_of(batch_BT: Tensor, rows: int, own: slice) -> list[Part]:
    """Parts of at most `rows` rows of those in `own`; the generators are read now."""
    start, whole = RandomState.take(batch_BT.device), len(batch_BT)
    firsts = range(own.start, own.stop, rows)
    slices = [slice(first, min(first + rows, own.stop)) for first in firsts]
    return [
        Part(batch_BT[s], (s.stop - s.start) / whole, RowDraws(s, whole), start) for s in slices
    ]


class RowDraws(TorchDispatchMode):
    """Draws for the whole batch and keeps the rows of a part, where the first axis is the rows'.

    Noise of gates and dropout masks are then those of an undivided pass. What is drawn for
    gathered tokens has no axis of rows and is drawn as it comes.

    Args:
        rows: of the part.
        of: rows of the whole.
    """

    def __init__(self, rows: slice, of: int) -> None:
        super().__init__()
        self.rows, self.of = rows, of

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        if func not in (
            ATEN.rand_like.default,
            ATEN.bernoulli_.float,
            ATEN.native_dropout.default,
        ) or not self._is_part(args[0]):
            return func(*args, **options)
        own, *rest = args
        whole = torch.ones((self.of, *own.shape[1:]), dtype=own.dtype, device=own.device)
        drawn = func(whole, *rest, **options)
        if func is ATEN.rand_like.default:
            return drawn[self.rows]
        if func is ATEN.bernoulli_.float:
            return own.copy_(drawn[self.rows])
        scaled, kept = drawn
        return own * scaled[self.rows], kept[self.rows]

    def _is_part(self, own: Tensor) -> bool:
        return own.dim() > 0 and own.shape[0] == self.rows.stop - self.rows.start


@dataclass(frozen=True)
class Rates:
    """Execute rates of the whole micro-batch, without gradient."""

    execute_rate: Tensor
    site_rates: dict[Site, Tensor]

    @classmethod
    def mean(cls, shares: Sequence[float], views: Sequence[RoutedView]) -> Rates:
        """From those of the parts, here and in the processes that train with this one."""

        def over(values: Sequence[Tensor]) -> Tensor:
            return torch.stack([s * v for s, v in zip(shares, values, strict=True)]).sum(0).detach()

        mean = over([view.execute_rate for view in views])
        sites = {site: over([v.site_rates[site] for v in views]) for site in views[0].site_rates}
        all_reduce([mean, *sites.values()])
        return cls(mean, sites)

    def seen_by(self, view: RoutedView) -> RoutedView:
        """A part's view with the whole's rates as values and its own as what carries gradient.

        With f the loss and w the parts' shares, the sum of w * gradient f(whole's rates) over the
        parts is the gradient of f at the whole's rates, because these are the w-weighted sum.
        """

        def pin(whole: Tensor, own: Tensor) -> Tensor:
            return whole + (own - own.detach())

        return replace(
            view,
            execute_rate=pin(self.execute_rate, view.execute_rate),
            site_rates={s: pin(self.site_rates[s], own) for s, own in view.site_rates.items()},
        )
