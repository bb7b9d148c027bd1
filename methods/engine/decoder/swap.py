"""The layers' forwards swapped for ones that hand each routed unit to an executor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from methods.base import Kind, Site
from methods.engine.decoder.adapter import LayerParts, decoder, layers_of
from methods.engine.decoder.dropped import hold_place
from methods.engine.decoder.forward import ForwardState, read_inputs
from methods.engine.decoder.placement import Placement, placed
from methods.engine.decoder.unit import LayerInputs, Unit
from methods.engine.ops.row_ops import MODULES, RowOps

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Executor(Protocol):
    """Turns a unit into the residual stream that leaves it."""

    def __call__(self, unit: Unit) -> Tensor:
        """Residual stream after the unit, [B, T, D]."""


@contextmanager
def swapped(
    model: PreTrainedModel,
    sites: frozenset[Site],
    executor: Executor,
    state: ForwardState,
    *,
    paused: Callable[[], bool] = lambda: False,
    dropped: frozenset[Site] = frozenset(),
    ops: RowOps = MODULES,
) -> Iterator[None]:
    """Send the units of `sites` through `executor`; the layers' forwards are put back on exit.

    Args:
        dropped: units that do not run at all.
        ops: row-wise work; the default calls the modules of the layers.
    """
    parts = layers_of(model)
    hook = decoder(model).register_forward_pre_hook(
        lambda _, args, kwargs: read_inputs(state, args, kwargs), with_kwargs=True
    )
    before = [part.layer.__dict__.get("forward") for part in parts]
    placement = Placement(parts) if placed(model) else None
    try:
        for index, part in enumerate(parts):
            forward = _layer_forward(index, part, sites, executor, state, paused, dropped, ops)
            if placement is not None:
                forward = placement.around(index, forward, state)
            part.layer.forward = forward
        with nullcontext() if placement is None else placement.lent():
            yield
    finally:
        hook.remove()
        for part, own in zip(parts, before, strict=True):
            part.layer.__dict__.pop("forward", None)
            if own is not None:
                part.layer.forward = own


def _layer_forward(
    index: int,
    part: LayerParts,
    sites: frozenset[Site],
    executor: Executor,
    state: ForwardState,
    paused: Callable[[], bool],
    dropped: frozenset[Site],
    ops: RowOps,
) -> Callable[..., Tensor]:
    """A pre-norm decoder layer in which routed units go through the executor."""
    original = part.layer.forward
    kinds: tuple[Kind, ...] = ("attention", "mlp")
    if Site(index, "block") in sites | dropped:
        kinds = ("block",)
    holds = bool({Site(index, "block"), Site(index, "attention")} & dropped)
    kinds = tuple(kind for kind in kinds if Site(index, kind) not in dropped)
    window = getattr(part.attention, "sliding_window", None)
    norms = {"mlp": part.mlp_norm, "attention": part.attention_norm, "block": part.attention_norm}
    units = [(Site(index, kind), norms[kind]) for kind in kinds]

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if paused():
            return original(hidden_states, *args, **kwargs)
        if args:
            kwargs["attention_mask"] = args[0]
        inputs = LayerInputs(
            position_embeddings=kwargs.pop("position_embeddings"),
            attention_mask=kwargs.pop("attention_mask", None),
            past_key_values=kwargs.pop("past_key_values", None),
            past=state.past,
            window=window,
            others=kwargs,
        )
        if holds:
            hold_place(part.attention, hidden_states, inputs.past_key_values)
        after = hidden_states
        for site, module in units:
            # what enters a layer may be held by who records hidden states, or by autograd
            owned = after is not hidden_states and not torch.is_grad_enabled()
            unit = Unit(site, part, after, module, inputs, ops, owned)
            after = executor(unit) if site in sites else unit.run()
        return after

    return forward
