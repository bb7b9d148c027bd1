"""Prefill and decode of one method on one model: seconds, bounds, memory, where the time goes.

`speedup` is dense over routed seconds; `bound` is what it would be if time followed the FLOPs
(prefill) or the bytes that must be read (decode); `efficiency` is their ratio.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from methods.base import Method, Site
from methods.engine.cache import allocated_bytes, cache_bytes, roomy_cache
from methods.engine.clock import PartClock
from methods.engine.counters import Usage
from methods.engine.flops import flops_ratio
from methods.engine.traffic import dense_bytes, routed_bytes
from methods.engine.wrap import Routing, routed, routing_of
from runners.stopwatch import Timing, interleaved, ratio, timed

Draw = Callable[[Site, Tensor], Tensor]
DRAWS = 16
"""Different random decisions per site."""


class Bench:
    """Times one routed model against the untouched one, on the same token rows.

    Args:
        model: untouched; routed only inside calls.
        method: calibrated, or as it was created if `draw` decides.
        ids_RT: int64 rows of text, as long as the longest case.
        draw: decisions instead of the router's (which still runs); None takes the router's.
        warmup, repeats: rounds before the clock, and timed ones.
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
        kernels: str = "auto",
    ) -> None:
        self.model, self.method, self.ids_RT, self.draw = model, method, ids_RT, draw
        self.warmup, self.repeats, self.kernels = warmup, repeats, kernels
        self.device = next(model.parameters()).device

    @torch.no_grad()
    def prefill(self, tokens: int, batch: int) -> dict[str, Any]:
        """A whole prompt into an empty cache, logits of the last token only."""
        ids = self._rows(batch, tokens)
        usage: list[Usage] = []

        def forward() -> None:
            self.model(input_ids=ids, past_key_values=roomy_cache(self.model), logits_to_keep=1)

        def run_routed() -> float:
            with self._routed() as routing:
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
        """`steps` tokens after a real cache of `context` tokens, one forward each."""
        ids = self._rows(batch, context + steps)
        caches = [roomy_cache(self.model) for _ in range(2)]
        usage: list[Usage] = []
        self.model(input_ids=ids[:, :context], past_key_values=caches[0], logits_to_keep=1)
        with self._routed():
            self.model(input_ids=ids[:, :context], past_key_values=caches[1], logits_to_keep=1)
        held = [cache_bytes(cache) for cache in caches]
        allocated = [allocated_bytes(cache) for cache in caches]

        def forward(cache: Any) -> None:
            for place in range(context, context + steps):
                self.model(input_ids=ids[:, place : place + 1], past_key_values=cache)

        def run_dense() -> float:
            taken = timed(lambda: forward(caches[0]), self.device)
            caches[0].crop(-steps)
            return taken

        def run_routed() -> float:
            with self._routed() as routing:
                taken = timed(lambda: forward(caches[1]), self.device)
                usage.append(routing.counters.read())
            caches[1].crop(-steps)
            return taken

        dense, sparse = self._interleave([run_dense, run_routed], f"decode {batch} x {context}")
        reads = dense_bytes(self.model, usage[-1])
        bound = reads / routed_bytes(self.model, self.method, usage[-1])
        entry = self._entry(dense, sparse, batch * steps, bound, usage[-1])
        for name, pair in (("cache_bytes", held), ("cache_allocated_bytes", allocated)):
            entry[name] = dict(zip(("dense", "routed"), pair, strict=True))
        parts = self._parts(lambda: forward(caches[1]))
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
            "routed_tps": tokens / sparse.median,
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
        with self._routed() as routing:
            clock = PartClock(self.device)
            routing.clock = clock
            whole = timed(forward, self.device)
        return {**clock.seconds, "other": max(0.0, whole - sum(clock.seconds.values()))}

    @contextmanager
    def _routed(self) -> Iterator[Routing]:
        with routed(self.model, self.method, "gathered"):
            routing = routing_of(self.model)
            routing.draw = self.draw
            yield routing

    def _rows(self, batch: int, tokens: int) -> Tensor:
        return self.ids_RT[:batch, :tokens].to(self.device)


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
        self.drawn: dict[tuple[Site, int, tuple[int, ...]], Tensor] = {}

    def __call__(self, site: Site, valid_BT: Tensor) -> Tensor:
        """Bool [B, T]."""
        turn = self.turn[site] = (self.turn.get(site, 0) + 1) % DRAWS
        key = (site, turn, tuple(valid_BT.shape))
        if key not in self.drawn:
            draw = torch.rand(valid_BT.shape, generator=self.generator, device=valid_BT.device)
            self.drawn[key] = draw >= self.share
        return self.drawn[key]
