"""Watch the units of a model under the dense forward: their outputs, and their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from methods.base import Site, UnitView
from methods.engine.adapter import shape_of
from methods.engine.unit import Unit
from methods.engine.wrap import ForwardState, swapped

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def observed(model: PreTrainedModel, visit: Callable[[UnitView], None]) -> Iterator[None]:
    """Call `visit` for every attention and MLP unit of each forward inside the block.

    The forward is the dense one; `visit` sees valid tokens only.
    """
    state = ForwardState()

    def executor(unit: Unit) -> Tensor:
        after = unit.run()
        assert state.valid_BT is not None
        keep = state.valid_BT
        delta = after - unit.residual_BTD
        visit(UnitView(unit.site, unit.x_BTD[keep], delta[keep], unit.residual_BTD[keep]))
        return after

    with swapped(model, frozenset(shape_of(model.config).units()), executor, state):
        yield


@contextmanager
def bypassed(model: PreTrainedModel, sites: frozenset[Site]) -> Iterator[None]:
    """Skip `sites` for every token inside the block (static depth)."""
    with swapped(model, frozenset(), lambda unit: unit.run(), ForwardState(), dropped=sites):
        yield


@contextmanager
def gradient_norms(model: PreTrainedModel, sums: dict[Site, Tensor]) -> Iterator[None]:
    """Add to `sums` the squared gradients at each unit's output, over valid tokens.

    The embeddings' output is made to require a gradient, so that frozen weights stay frozen.
    """
    state = ForwardState()

    def executor(unit: Unit) -> Tensor:
        delta = unit.run() - unit.residual_BTD

        def add(gradient: Tensor) -> None:
            assert state.valid_BT is not None
            squared = gradient.float().square().sum(-1)
            total = (squared * state.valid_BT).sum()
            sums[unit.site] = sums[unit.site] + total if unit.site in sums else total

        delta.register_hook(add)
        return unit.residual_BTD + delta

    embeddings = model.get_input_embeddings()
    hook = embeddings.register_forward_hook(lambda _, __, out: out.requires_grad_(True))
    try:
        units = frozenset(shape_of(model.config).units())
        with swapped(model, units, executor, state), torch.enable_grad():
            yield
    finally:
        hook.remove()
