"""Prefill and decode of one method on one model: seconds, bounds, memory, where the time goes.

`speedup` is dense over routed seconds, the median of pairs; `bound` is what it would be if time
followed the FLOPs (prefill) or the bytes that must be read (decode); `efficiency` is their ratio.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from methods.base import Method, Site
from methods.engine.cache.growing import allocated_bytes, cache_bytes, preallocated_cache
from methods.engine.decoder.placement import input_device
from methods.engine.measure.clock import Bench as RoutingBench
from methods.engine.measure.counters import Usage
from methods.engine.measure.flops import flops_ratio
from methods.engine.measure.graphs import WARMUP_STEPS, DecodeGraph, static_cache
from methods.engine.measure.traffic import dense_bytes, routed_bytes
from methods.engine.ops.choose import Kernels, row_ops
from methods.engine.routed import routed
from methods.engine.routing import Routing, routing_of
from runners.timing.stopwatch import Timing, interleaved, ratio, timed

Draw = Callable[[Site, Tensor], Tensor]

FIRST_TOKENS = (8, 1)
"""Several tokens and one take different paths."""


class Bench:
    """Times one routed model against the untouched one, on the same token rows.

    Args:
        model: untouched; routed only inside calls.
        method: calibrated, or as it was created if `draw` decides.
        ids_RT: int64 rows of text, as long as the longest case.
        draw: decisions instead of the router's (which still runs); None takes the router's.
        warmup, repeats: rounds before the clock, and timed ones.
        kernels: of the gathered path.
        graphs: decode by CUDA graphs, dense and routed alike.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        method: Method,
        ids_RT: Tensor,
        *,
        draw: Draw | None,
        warmup: int,
        repeats: int,
        kernels: Kernels = "auto",
        graphs: bool = False,
    ) -> None:
        self.model, self.method, self.ids_RT, self.draw = model, method, ids_RT, draw
        self.warmup, self.repeats = warmup, repeats
        self.kernels: Kernels = kernels
        self.graphs = graphs
        self.device = input_device(model)

    @torch.no_grad()
    def prefill(self, tokens: int, batch: int) -> dict[str, Any]:
        """A whole prompt into an empty cache, logits of the last token only."""
        ids = self._rows(batch, tokens)
        usage: list[Usage] = []
        # a slice (1) is not contiguous, and PyTorch then copies the whole bfloat16 head on a CPU
        last = torch.tensor([tokens - 1], device=ids.device)

        def forward() -> None:
            self.model(
                input_ids=ids, past_key_values=preallocated_cache(self.model), logits_to_keep=last
            )

        def run_routed() -> float:
            with self.entered() as routing:
                taken = timed(forward, self.device)
                usage.append(routing.counters.read())
            return taken

        dense, sparse = self._interleave(
            [lambda: timed(forward, self.device), run_routed], f"prefill {batch} x {tokens}"
        )
        bound = 1.0 / flops_ratio(self.method, usage[-1], head_tokens=batch)
        entry = self._entry(dense, sparse, batch * tokens, bound, usage[-1])
        entry["time_to_first_token_s"] = {"dense": dense.median, "routed": sparse.median}
        return {"seq": tokens, "batch": batch, **entry, "parts_s": self._parts(forward)}

    @torch.no_grad()
    def decode(self, context: int, batch: int, steps: int) -> dict[str, Any]:
        """`steps` tokens after a real cache of `context` tokens, one forward each.

        With `graphs` both models replay a CUDA graph of one step, over a static cache.
        """
        ids = self._rows(batch, context + steps)
        dense_steps = Decoder(self.model, ids, context, graphs=self.graphs)
        with self.entered() as routing:
            routed_steps = Decoder(self.model, ids, context, graphs=self.graphs)
            routing.reset_counters()
            routed_steps.run(steps, graph=False)
            usage = routing.counters.read()
            clock = self._clock(routing)
            whole = timed(lambda: routed_steps.run(steps, graph=False), self.device)

        def run_routed() -> float:
            with self.entered():
                return timed(lambda: routed_steps.run(steps), self.device)

        dense, sparse = self._interleave(
            [lambda: timed(lambda: dense_steps.run(steps), self.device), run_routed],
            f"decode {batch} x {context}",
        )
        reads = dense_bytes(self.model, usage)
        bound = reads / routed_bytes(self.model, self.method, usage)
        entry = self._entry(dense, sparse, batch * steps, bound, usage)
        for name in ("cache_bytes", "cache_allocated_bytes"):
            entry[name] = {
                "dense": getattr(dense_steps, name),
                "routed": getattr(routed_steps, name),
            }
        parts = _with_rest(clock, whole)
        return {"context": context, "batch": batch, "steps": steps, **entry, "parts_s": parts}

    def _interleave(self, runs: list[Callable[[], float]], label: str) -> list[Timing]:
        return interleaved(
            runs, device=self.device, warmup=self.warmup, repeats=self.repeats, label=label
        )

    def _entry(
        self, dense: Timing, sparse: Timing, tokens: int, bound: float, usage: Usage
    ) -> dict[str, Any]:
        speedup = ratio(dense, sparse)
        return {
            "dense_tps": tokens / dense.median,
            # at the dense model's median pace, so that the three figures agree: of a machine that
            # drifts, the pairs give the ratio better than the two medians do
            "routed_tps": tokens / dense.median * speedup["median"],
            "speedup": speedup["median"],
            "speedup_p20": speedup["p20"],
            "speedup_p80": speedup["p80"],
            "bound": bound,
            "efficiency": speedup["median"] / bound,
            "sparsity": usage.sparsity(),
            "dense_s": dense.spread(),
            "routed_s": sparse.spread(),
            "peak_memory_bytes": {
                "dense": dense.peak_memory_bytes,
                "routed": sparse.peak_memory_bytes,
            },
        }

    def _parts(self, forward: Callable[[], None]) -> dict[str, float]:
        """Seconds by kind of work, of one further routed pass under a clock."""
        with self.entered() as routing:
            clock = self._clock(routing)
            return _with_rest(clock, timed(forward, self.device))

    @property
    def compiled_loops(self) -> bool:
        """Whether row-wise work runs as compiled loops."""
        return row_ops(self.kernels, self.model).compiled

    @contextmanager
    def entered(self) -> Iterator[Routing]:
        """Route the model; what a block reads once, since users enter one, is read before."""
        with routed(self.model, self.method, "gathered", kernels=self.kernels):
            routing = routing_of(self.model)
            routing.bench = RoutingBench(self.device, self.draw)
            for tokens in FIRST_TOKENS:
                self.model(input_ids=self._rows(1, tokens), use_cache=False)
            routing.reset_counters()
            yield routing

    def _clock(self, routing: Routing) -> RoutingBench:
        """Time the parts of what runs from now on."""
        assert routing.bench is not None
        routing.bench.timing = True
        return routing.bench

    def _rows(self, batch: int, tokens: int) -> Tensor:
        return self.ids_RT[:batch, :tokens].to(self.device)


def _with_rest(clock: RoutingBench, whole: float) -> dict[str, float]:
    return {**clock.seconds, "other": max(0.0, whole - sum(clock.seconds.values()))}


class Decoder:
    """A cache filled with the first `context` tokens of each row; `run` decodes the next ones.

    Built inside a `routed` block it is the routed model's, and must run inside one.

    Args:
        ids_BT: int64, on the model's device.
        graphs: replay a CUDA graph of one step, over a static cache.
    """

    def __init__(
        self, model: PreTrainedModel, ids_BT: Tensor, context: int, *, graphs: bool
    ) -> None:
        self.model, self.ids_BT, self.context = model, ids_BT, context
        batch, room = ids_BT.shape[0], ids_BT.shape[1] + WARMUP_STEPS
        self.cache: Any = preallocated_cache(model)
        if graphs:
            self.cache = static_cache(model, batch=batch, tokens=room)
        model(input_ids=ids_BT[:, :context], past_key_values=self.cache, logits_to_keep=1)
        self.cache_bytes = cache_bytes(self.cache)
        self.cache_allocated_bytes = allocated_bytes(self.cache)
        self.graph = DecodeGraph(model, self.cache, batch=batch) if graphs else None
        # a graph reads merged adapters where they lay at its capture, in a block that has ended
        self.held = [module.forward for module in model.modules()] if graphs else []

    def run(self, steps: int, *, graph: bool = True) -> None:
        """Decode the tokens after the context, one forward each, and forget them again."""
        replayed = self.graph if graph else None
        for place in range(self.context, self.context + steps):
            token_B1 = self.ids_BT[:, place : place + 1]
            if replayed is None:
                self.model(input_ids=token_B1, past_key_values=self.cache)
            else:
                replayed(token_B1)
        if self.graph is None:
            self.cache.crop(-steps)
        else:
            self.graph.rewind(self.context)


DRAWS = 16
"""Different random decisions per site."""


class RandomDraw:
    """Bernoulli decisions at a sparsity, a few drawn per site and shape, then replayed in turn.

    Args:
        sparsity: over all units of the model; sites that cover only part of them bypass more.
        covered: share of all units that the method routes.

    Raises:
        ValueError: more than the method's sites can bypass.
    """

    def __init__(self, sparsity: float, covered: float, seed: int, device: torch.device) -> None:
        if sparsity > covered:
            raise ValueError(f"sparsity {sparsity} is out of reach: {covered:.3f} of units routed")
        self.share = sparsity / covered if covered else 0.0
        self.generator = torch.Generator(device=device).manual_seed(seed)
        self.turn: dict[Site, int] = {}
        self.drawn: dict[tuple[Site, tuple[int, ...]], list[Tensor]] = {}

    def __call__(self, site: Site, valid_BT: Tensor) -> Tensor:
        """Bool [B, T]."""
        turn = self.turn[site] = (self.turn.get(site, 0) + 1) % DRAWS
        key = (site, tuple(valid_BT.shape))
        if key not in self.drawn:
            # all at once, so that no later pass pays for drawing
            size = (DRAWS, *valid_BT.shape)
            draws = torch.rand(size, generator=self.generator, device=self.generator.device)
            self.drawn[key] = list((draws >= self.share).to(valid_BT.device).unbind())
        return self.drawn[key][turn]
