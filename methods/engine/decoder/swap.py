"""Swap the forwards of a decoder and its layers: each routed unit then goes to an executor.

No module of a model is ever replaced. What stands in a module's place is its `forward` alone, so
that weights, names and classes are those of the untouched model throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from threading import RLock
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from methods.base import Kind, Site
from methods.engine.decoder.families import LayerParts, decoder, layers_of
from methods.engine.decoder.inputs import ForwardCall, LayerInputs
from methods.engine.decoder.placement import Placement, placed
from methods.engine.decoder.unit import Unit
from methods.engine.ops.row_ops import MODULES, RowOps

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Forward = Callable[..., Any]


class Executor(Protocol):
    """Turns a unit into the residual stream that leaves it."""

    def __call__(self, unit: Unit) -> Tensor:
        """Residual stream after the unit, [B, T, D]."""


@dataclass
class DecoderState:
    """What the forwards of a swapped decoder share."""

    call: ForwardCall = field(default_factory=ForwardCall)
    """The forward call that the decoder is in, or was in last."""
    paused: bool = False
    """True runs the untouched layers."""
    lock: Any = field(default_factory=RLock, repr=False)
    """Held by the thread whose forward call runs; another one waits, since `call`, decisions and
    counts are those of one call."""

    def started(self, call: ForwardCall) -> None:
        """Called before the layers of a forward call run."""

    def ended(self) -> None:
        """Called after they ran."""


class SwappedForward:
    """A forward in the place of a module's own, which a copy of the module must not have."""

    original: Forward

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse `copy.deepcopy` and pickle: the copy would compute with the original's weights."""
        raise ValueError(
            "a model cannot be copied or pickled inside a `routed` block: leave the block first"
        )


def untouched(module: nn.Module) -> Forward:
    """Return the forward that a module has outside of every block."""
    forward: Any = module.forward
    while isinstance(forward, SwappedForward):
        forward = forward.original
    found: Forward = forward
    return found


@contextmanager
def swapped_forwards(forwards: Iterable[tuple[nn.Module, Forward]]) -> Iterator[None]:
    """Put each forward in the place of its module's own inside the block."""
    before: list[tuple[nn.Module, Forward | None]] = []
    try:
        for module, forward in forwards:
            before.append((module, module.__dict__.get("forward")))
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, own in reversed(before):
            module.__dict__.pop("forward", None)
            if own is not None:
                module.__dict__["forward"] = own


@contextmanager
def swapped(
    model: PreTrainedModel,
    sites: frozenset[Site],
    executor: Executor,
    state: DecoderState | None = None,
    *,
    dropped: frozenset[Site] = frozenset(),
    ops: RowOps = MODULES,
) -> Iterator[None]:
    """Send the units of `sites` through `executor` inside the block.

    Args:
        dropped: units that do not run, and leave no keys and values; those that are in `sites` too
            go through the executor nevertheless.
        ops: row-wise work; the default calls the modules of the layers.
    """
    parts, stack = layers_of(model), decoder(model)
    state = DecoderState() if state is None else state
    placement = Placement(parts) if placed(model) else None
    forwards: list[tuple[nn.Module, Forward]] = [(stack, _DecoderForward(stack.forward, state))]
    for index, part in enumerate(parts):
        forward: Any = _LayerForward(index, part, sites, executor, state, dropped, ops)
        forward.placement = placement
        forwards.append((part.layer, forward))
    with (
        swapped_forwards(forwards),
        nullcontext() if placement is None else placement.materialised(),
    ):
        yield


class _DecoderForward(SwappedForward):
    """The decoder's forward, one call at a time."""

    def __init__(self, original: Forward, state: DecoderState) -> None:
        self.original, self.state = original, state

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        state = self.state
        with state.lock:
            if state.paused:
                return self.original(*args, **kwargs)
            state.call = ForwardCall.read(args, kwargs)
            state.started(state.call)
            out = self.original(*args, **kwargs)
            state.ended()
            return out


class _LayerForward(SwappedForward):
    """A decoder layer in which routed units go through the executor."""

    placement: Placement | None = None

    def __init__(
        self,
        index: int,
        part: LayerParts,
        sites: frozenset[Site],
        executor: Executor,
        state: DecoderState,
        dropped: frozenset[Site],
        ops: RowOps,
    ) -> None:
        self.original, self.index, self.part = part.layer.forward, index, part
        self.sites, self.executor, self.state, self.ops = sites, executor, state, ops
        kinds: tuple[Kind, ...] = ("attention", "mlp")
        if Site(index, "block") in sites | dropped:
            kinds = ("block",)
        norms = {"attention": part.attention_norm, "mlp": part.mlp_norm}
        self.units = [
            (Site(index, kind), norms.get(kind, part.attention_norm))
            for kind in kinds
            if Site(index, kind) in sites or Site(index, kind) not in dropped
        ]
        away = bool({Site(index, "block"), Site(index, "attention")} & dropped)
        self.holds = away and part.first_of_kind

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        state = self.state
        run: Forward = self.original if state.paused else self._run
        if self.placement is None:
            out: Tensor = run(hidden_states, *args, **kwargs)
            return out
        return self.placement.run(self.index, run, state.call, (hidden_states, *args), kwargs)

    def _run(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args:
            kwargs["attention_mask"] = args[0]
        inputs = LayerInputs(
            self.state.call,
            position_embeddings=kwargs.pop("position_embeddings"),
            attention_mask=kwargs.pop("attention_mask", None),
            past_key_values=kwargs.pop("past_key_values", None),
            window=self.part.window,
            softcap=self.part.softcap,
            others=kwargs,
        )
        if self.holds:
            _write_placeholder(self.part.attention, hidden_states, inputs.past_key_values)
        after = hidden_states
        for site, norm in self.units:
            # what enters a layer may be held by who records hidden states, or by autograd;
            # without a norm it is the unit's input as well
            own = after is not hidden_states and not isinstance(norm, nn.Identity)
            owned = own and not torch.is_grad_enabled()
            unit = Unit(site, self.part, after, norm, inputs, self.ops, owned, hidden_states)
            after = self.executor(unit) if site in self.sites else unit.run()
        return after


def _write_placeholder(attention: Any, hidden_BTD: Tensor, past_key_values: Any) -> None:
    """Write zeros to the cache for the tokens of a dropped layer.

    Transformers reads the number of past tokens off the first layer of the cache, and the size of
    a mask off the first layer with a window and the first without; other dropped layers stay empty.
    """
    if past_key_values is None:
        return
    batch, tokens, _ = hidden_BTD.shape
    heads = attention.config.num_key_value_heads
    zeros = hidden_BTD.new_zeros(batch, heads, tokens, attention.head_dim)
    past_key_values.update(zeros, zeros, attention.layer_idx)
