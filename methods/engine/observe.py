"""Watch a model's units: outputs under the dense or the routed forward, and their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from methods.base import Decision, Method, Site, UnitView
from methods.engine.cache.forecast_keys import projected_keys
from methods.engine.decoder.families import shape_of
from methods.engine.decoder.neurons import neurons_of
from methods.engine.decoder.swap import swapped
from methods.engine.decoder.unit import Unit
from methods.engine.routed import routed
from methods.engine.routing import routing_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def observed(model: PreTrainedModel, visit: Callable[[UnitView], None]) -> Iterator[None]:
    """Call `visit` for every attention and MLP unit of each forward inside the block.

    The forward is the dense one; `visit` sees valid tokens only.
    """

    layer_input_ND: Tensor | None = None

    def executor(unit: Unit) -> Tensor:
        nonlocal layer_input_ND
        after = unit.run()
        keep = unit.inputs.call.valid_BT
        delta = after - unit.residual_BTD
        residual_ND = unit.residual_BTD[keep]
        if unit.attends:
            layer_input_ND = residual_ND
        x_ND = unit.x_BTD[keep]
        view = UnitView(unit.site, x_ND, delta[keep], residual_ND, layer_input_ND)
        # of `x_ND`, not of the view: a view that held itself would keep the tensors of every unit
        # until garbage is collected
        if unit.attends:
            view.keys = lambda: projected_keys(unit.part.attention, x_ND)
        else:
            view.neurons = lambda: neurons_of(unit.part, x_ND)
        visit(view)
        return after

    with swapped(model, frozenset(shape_of(model.config).units()), executor):
        yield


@contextmanager
def observed_routed(
    model: PreTrainedModel, method: Method, visit: Callable[[UnitView], None]
) -> Iterator[None]:
    """Call `visit` for every routed unit of each forward of the routed model inside the block."""

    def observe(unit: Unit, decision: Decision, after: Tensor) -> None:
        keep = unit.inputs.call.valid_BT
        delta = after - unit.residual_BTD
        visit(
            UnitView(
                unit.site,
                unit.x_BTD[keep],
                delta[keep],
                unit.residual_BTD[keep],
                execute_N=decision.execute_BT[keep],
            )
        )

    with routed(model, method):
        routing_of(model).unit_observer = observe
        yield


@contextmanager
def bypassed(model: PreTrainedModel, sites: frozenset[Site]) -> Iterator[None]:
    """Skip `sites` for every token inside the block (static depth)."""
    with swapped(model, frozenset(), lambda unit: unit.run(), dropped=sites):
        yield


@contextmanager
def unit_gradients(model: PreTrainedModel, visit: Callable[[Site, Tensor], None]) -> Iterator[None]:
    """Call `visit(site, gradient [N, D])` for each unit's output in every backward pass.

    Padding is removed. The embeddings' output is made to require a gradient, so that frozen
    weights stay frozen.
    """

    def executor(unit: Unit) -> Tensor:
        delta = unit.run() - unit.residual_BTD
        keep = unit.inputs.call.valid_BT
        delta.register_hook(lambda gradient: visit(unit.site, gradient[keep]))
        return unit.residual_BTD + delta

    embeddings = model.get_input_embeddings()
    hook = embeddings.register_forward_hook(lambda _, __, out: out.requires_grad_(True))
    try:
        units = frozenset(shape_of(model.config).units())
        with swapped(model, units, executor), torch.enable_grad():
            yield
    finally:
        hook.remove()
