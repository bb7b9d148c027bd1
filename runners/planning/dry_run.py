"""Training steps and passes at a model's real sizes without its weights: tensors on `meta`.

Every operation is seen once, so that its FLOPs and the memory alive at any time are counted, not
guessed; nothing is computed. Fused attention keeps no T x T matrix, so it stands in for the one
that `meta` would take, and its FLOPs are added by formula.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as meta_rules
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel

from methods.base import Method, Probe, Shape, Site, Stage, SwiGLU, UnitView
from methods.engine.decoder.adapter import decoder, shape_of
from methods.engine.observe import unit_gradients
from runners.training.loop import Loop
from runners.training.losses import language_model_loss
from runners.training.passes import Objective

ATTENTION = "counted"


@dataclass(frozen=True)
class Cost:
    """Of one step or pass."""

    flops: float
    bytes: int
    """Largest sum of tensors alive that it made itself: the model's and method's not included."""
    trained: int = 0
    """Parameters that get a gradient."""


class Meter(TorchDispatchMode):
    """Counts FLOPs and the bytes of tensors alive, by storage.

    Args:
        owners: whose parameters and buffers are no news.
    """

    def __init__(self, *owners: nn.Module) -> None:
        super().__init__()
        self.flops, self.alive, self.peak = 0.0, 0, 0
        tensors = [t for owner in owners for t in (*owner.parameters(), *owner.buffers())]
        self._known = {tensor.untyped_storage()._cdata for tensor in tensors}
        self._seen: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._note(leaf.untyped_storage())
        return out

    def _note(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen or key in self._known:
            return
        self.alive += size
        self.peak = max(self.peak, self.alive)

        def drop(_: Any) -> None:
            self._seen.pop(key, None)
            self.alive -= size

        self._seen[key] = weakref.ref(storage, drop)


class _Fused(torch.autograd.Function):
    """Keeps what flash attention keeps: queries, keys, values, output, and a number a row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        rows = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, rows)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        query, key, value, *_ = ctx.saved_tensors
        return tuple(torch.empty_like(kept) for kept in (query, key, value))


def _fused(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any
) -> tuple[Tensor, None]:
    out: Tensor = _Fused.apply(query, key, value)
    return out.transpose(1, 2).contiguous(), None


def meta_model(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """A frozen model of these sizes without memory."""
    AttentionInterface.register(ATTENTION, _fused)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION)
    frozen: PreTrainedModel = model.eval().requires_grad_(False)
    return frozen


@contextmanager
def metered(*owners: nn.Module) -> Iterator[Meter]:
    """Meter what runs inside; a mask is taken to keep every token."""
    before = meta_rules.meta_nonzero_assume_all_nonzero
    meta_rules.meta_nonzero_assume_all_nonzero = True
    try:
        with torch.device("meta"), Meter(*owners) as meter:
            yield meter
    finally:
        meta_rules.meta_nonzero_assume_all_nonzero = before


def scores_flops(shape: Shape, batch: int, tokens: int) -> float:
    """Forward FLOPs of causal attention's two products, all layers."""
    context = batch * tokens * (tokens + 1) / 2
    return shape.layers * 4.0 * shape.heads * shape.head_dim * context


def forward_cost(model: PreTrainedModel, *, batch: int, tokens: int, head: bool) -> Cost:
    """One dense forward without gradient; `head` adds the logits of a chunk of tokens."""
    with metered(model) as meter, torch.no_grad():
        hidden = decoder(model)(input_ids=_ids(batch, tokens), use_cache=False)[0]
        if head:
            model.get_output_embeddings()(hidden.flatten(0, 1))
    scores = scores_flops(shape_of(model.config), batch, tokens)
    return Cost(meter.flops + scores, meter.peak)


def sensitivity_cost(model: PreTrainedModel, *, batch: int, tokens: int) -> Cost:
    """Forward and backward of the LM loss to every unit's output."""
    with metered(model) as meter, unit_gradients(model, lambda site, gradient: None):
        language_model_loss(model, _ids(batch, tokens)).backward()
    scores = 3.5 * scores_flops(shape_of(model.config), batch, tokens)
    return Cost(meter.flops + scores, meter.peak)


def step_cost(
    model: PreTrainedModel, method: Method, stage: Stage, objective: Objective, target: float
) -> Cost:
    """Forward and backward of one micro-batch of a gradient stage.

    Its attention costs 1 forward, 2.5 backward (five products for two), 1 for a teacher. A `hard`
    stage is counted as if every unit ran for every token: an upper bound.
    """
    assert stage.budget is not None
    loop = Loop(model, method, _NoProbe(), lambda _: _ids(1, 1), objective=objective, seed=0)
    batch, tokens = stage.budget.batch_size, stage.budget.seq_len
    trained = sum(p.numel() for p in loop._trainable(stage))
    soft = replace(stage, hard=False)
    with metered(model, method) as meter:
        for loss, _, _ in loop.passes.losses(soft, _ids(batch, tokens), batch, 0.5, target):
            loss.backward()
    method.zero_grad(set_to_none=True)
    times = 1.0 if stage.forward == "dense" else 3.5 + (objective == "distill")
    scores = times * scores_flops(shape_of(model.config), batch, tokens)
    return Cost(meter.flops + scores, meter.peak, trained)


def visit_cost(
    model: PreTrainedModel, method: Method, fit: Callable[[Probe], None], tokens: int
) -> Cost:
    """What a fit does with a batch of each unit's inputs and outputs, and keeps.

    The fit runs on `meta` until it asks for a number, which is after its first pass; a fit that
    asks at once keeps nothing worth planning for.
    """
    probe = _MetaProbe(model, tokens)
    with metered(model, method) as meter, torch.no_grad():
        probe.meter = meter
        with suppress(RuntimeError, NotImplementedError, _Asked):
            fit(probe)
    return Cost(probe.flops, meter.peak)


class _Asked(Exception):
    """The fit wants figures, of which `meta` has none."""


class _NoProbe:
    """Stands where a step needs no probe."""

    def __getattr__(self, name: str) -> Any:
        raise _Asked(name)


class _MetaProbe(_NoProbe):
    """Shows a fit every unit once, with `tokens` tokens."""

    def __init__(self, model: PreTrainedModel, tokens: int) -> None:
        self.shape, self.tokens = shape_of(model.config), tokens
        self.dtype = next(model.parameters()).dtype
        self.meter: Meter | None = None
        self.flops = 0.0

    def sample(self, share: float = 0.25) -> _MetaProbe:
        return self

    def stream(self, visit: Callable[[UnitView], None], split: str = "train") -> None:
        assert self.meter is not None
        before = self.meter.flops
        for site in self.shape.units():
            visit(self._view(site))
        self.flops = max(self.flops, self.meter.flops - before)

    def stream_routed(self, visit: Callable[[UnitView], None]) -> None:
        def routed(view: UnitView) -> None:
            view.execute_N = torch.zeros(self.tokens, dtype=torch.bool)
            visit(view)

        self.stream(routed)

    def swiglu(self, site: Site) -> SwiGLU:
        rows, width = self.shape.mlp_width, self.shape.width
        gate, up = (torch.empty(rows, width, dtype=self.dtype) for _ in range(2))
        return SwiGLU(gate, up, torch.empty(width, rows, dtype=self.dtype))

    def _neurons(self, site: Site, x_ND: Tensor) -> Tensor:
        gate, up, _ = self.swiglu(site)
        return functional.silu(x_ND @ gate.T) * (x_ND @ up.T)

    def _view(self, site: Site) -> UnitView:
        x, y, residual = (
            torch.empty(self.tokens, self.shape.width, dtype=self.dtype) for _ in range(3)
        )
        view = UnitView(site, x, y, residual)
        width = 2 * self.shape.kv_heads * self.shape.head_dim
        view.keys = lambda: torch.empty(self.tokens, width, dtype=self.dtype)
        view.neurons = lambda: self._neurons(site, x)
        return view


def _ids(batch: int, tokens: int) -> Tensor:
    return torch.zeros(batch, tokens, dtype=torch.long, device="meta")
