"""Check each kernel against its reference on a GPU, and time it against dense PyTorch.

    python benchmarks/kernels.py batch=1 tokens=2048 past=0 repeats=50

Settings are key=value; the defaults are a layer of Llama-3.1-8B in bfloat16. Decode is `tokens=1
past=4096`, where times are those of a replayed CUDA graph.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # run the code of this clone, whichever clone's environment it is
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.arguments import settings_of
from methods.engine.ops.triton.attend_rows import attend
from methods.engine.ops.triton.linear_rows import linear_rows, linear_rows_add
from methods.engine.ops.triton.mlp_rows import swiglu_rows
from methods.engine.ops.triton.partition import Partition, partition
from methods.engine.ops.triton.route import LinearScore, LowRank, route_and_forecast

SHARES = (0.3, 0.5, 0.7, 1.0)
SAMPLE = 256
"""Queries of an attention that are compared with the reference."""
GAP = 16
"""Places around the wanted threshold that are searched for one no rounding can cross."""


@dataclass(frozen=True)
class Settings:
    """Sizes of one layer and of one forward."""

    batch: int = 1
    tokens: int = 2048
    past: int = 0
    width: int = 4096
    mlp_width: int = 14336
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    rank: int = 100
    warmup: int = 10
    repeats: int = 50


@dataclass
class Case:
    """One operation: its kernel, what it must give, and the dense work that it replaces."""

    name: str
    run: Callable[[], object]
    """What is timed; it adds to scratch memory again and again where it works in place."""
    found: Callable[[], Tensor]
    expected: Callable[[], Tensor]
    dense: Callable[[], object] | None = None


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Normal numbers scaled by the last dimension, as weights are."""
    return torch.randn(*shape, device="cuda", dtype=dtype) / shape[-1] ** 0.5


class Layer:
    """Weights, activations and a cache."""

    def __init__(self, s: Settings) -> None:
        self.s, rows, inner = s, s.batch * s.tokens, s.heads * s.head_dim
        self.x = torch.randn(rows, s.width, device="cuda", dtype=torch.bfloat16)
        self.residual = torch.randn_like(self.x)
        self.gate, self.up = random(s.mlp_width, s.width), random(s.mlp_width, s.width)
        self.down = random(s.width, s.mlp_width)
        self.q, self.o = random(inner, s.width), random(s.width, inner)
        self.query = torch.randn(rows, inner, device="cuda", dtype=torch.bfloat16)
        slots = s.past + s.tokens
        cache = (s.batch, s.kv_heads, slots, s.head_dim)
        self.key, self.value = (
            torch.randn(*cache, device="cuda", dtype=torch.bfloat16) for _ in "kv"
        )
        self.valid = torch.ones(rows, dtype=torch.bool, device="cuda")
        self.projections = ((self.x, self.q), (self.query, self.o))
        exact = torch.float32
        self.score = random(s.width, dtype=exact)
        self.forecast = LowRank(
            random(s.rank, s.width, dtype=exact),
            random(s.width, s.rank, dtype=exact),
            random(s.width, dtype=exact),
        )

    def cases(self, share: float) -> list[Case]:
        """Every operation at this share of executed tokens, in one random draw."""
        valid = torch.ones(self.s.batch, self.s.tokens, dtype=torch.bool, device="cuda")
        execute = torch.rand(self.s.batch, self.s.tokens, device="cuda") < share
        order = partition(execute, valid, kernels="torch")
        used = order.index_N.new_ones(len(self.x)).cumsum(0) <= order.executed
        sample = used.nonzero()[:, 0]
        sample = sample[torch.randperm(len(sample), device="cuda")[:SAMPLE].sort().values]
        linear = LinearScore(self.score, 0.0, self.threshold(share))
        q, o = (partial(functional.linear, *pair) for pair in self.projections)
        return [
            Case(
                "partition",
                partial(partition, execute, valid, kernels="triton"),
                lambda: partition(execute, valid, kernels="triton").index_N,
                lambda: order.index_N,
            ),
            self.in_place("router+forecast+partition", partial(self.run_route, linear)),
            Case(
                "q rows",
                partial(self.run_q, order, "triton"),
                lambda: self.run_q(order, "triton")[used],
                lambda: self.run_q(order, "torch")[used],
                q,
            ),
            Case(
                "attend",
                partial(self.run_attend, order, "triton"),
                lambda: self.run_attend(order, "triton")[sample],
                lambda: self.run_attend(sampled(order, sample, self.s), "torch", sample),
                self.dense_attention,
            ),
            self.in_place("o rows", partial(self.run_o, order), o),
            self.in_place("mlp rows", partial(self.run_mlp, order), self.dense_mlp),
        ]

    def in_place(
        self,
        name: str,
        run: Callable[[str, Tensor], None],
        dense: Callable[[], object] | None = None,
    ) -> Case:
        """A case of an operation that adds to the residual that it is given."""

        def result(kernels: str) -> Tensor:
            out = self.residual.clone()
            run(kernels, out)
            return out

        scratch = self.residual.clone()
        return Case(
            name,
            partial(run, "triton", scratch),
            partial(result, "triton"),
            partial(result, "torch"),
            dense,
        )

    def threshold(self, share: float) -> Tensor:
        """About the quantile that executes `share`, where the scores leave the widest gap."""
        scores = (self.x.float() @ self.score).sort(descending=True).values
        ends = torch.tensor([float("inf")], device="cuda")
        scores = torch.cat((ends, scores, -ends)).clamp(-1e3, 1e3)
        place = round(share * len(self.x))
        near = (
            scores[max(place - GAP, 0) : place + GAP + 2] if 0 < share < 1 else scores[place:][:2]
        )
        widest = (near[:-1] - near[1:]).argmax()
        return (near[widest] + near[widest + 1]) / 2

    def run_route(self, linear: LinearScore, kernels: str, out: Tensor) -> None:
        route_and_forecast(
            self.x, out, self.valid, linear, self.forecast, tokens=self.s.tokens, kernels=kernels
        )

    def run_q(self, order: Partition, kernels: str) -> Tensor:
        return linear_rows(self.x, order.index_N, order.executed, self.q, kernels=kernels)

    def run_o(self, order: Partition, kernels: str, out: Tensor) -> None:
        linear_rows_add(self.query, out, order.index_N, order.executed, self.o, kernels=kernels)

    def run_mlp(self, order: Partition, kernels: str, out: Tensor) -> None:
        weights = (self.gate, self.up, self.down)
        swiglu_rows(self.x, out, order.index_N, order.executed, *weights, kernels=kernels)

    def run_attend(self, order: Partition, kernels: str, rows: Tensor | None = None) -> Tensor:
        query = self.query.view(-1, self.s.heads, self.s.head_dim)
        return attend(
            query if rows is None else query[rows],
            order.index_N,
            order.counts_B,
            order.starts_B,
            self.key,
            self.value,
            tokens=self.s.tokens,
            past=self.s.past,
            scale=self.s.head_dim**-0.5,
            kernels=kernels,
        )

    def dense_mlp(self) -> Tensor:
        middle = functional.silu(functional.linear(self.x, self.gate))
        middle = middle * functional.linear(self.x, self.up)
        return self.residual + functional.linear(middle, self.down)

    def dense_attention(self) -> Tensor:
        query = self.query.view(self.s.batch, self.s.tokens, self.s.heads, -1).transpose(1, 2)
        return functional.scaled_dot_product_attention(
            query, self.key, self.value, is_causal=self.s.tokens > 1, enable_gqa=True
        )


def sampled(order: Partition, rows: Tensor, s: Settings) -> Partition:
    """The order of these ranks only: the reference attends with few rows at a time."""
    index = order.index_N[rows]
    counts = (index // s.tokens).bincount(minlength=s.batch)
    return order._replace(index_N=index, counts_B=counts, starts_B=counts.cumsum(0) - counts)


def milliseconds(run: Callable[[], object], s: Settings) -> tuple[float, float, float]:
    """p20, median and p80; a decode step is replayed from a graph, launches would hide it."""
    for _ in range(s.warmup):
        run()
    if s.tokens == 1:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        run = graph.replay
    flush = torch.empty(128 * 2**20, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(s.repeats):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    low, median, high = torch.tensor(times).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    return low, median, high


def error(case: Case) -> float:
    """Largest difference from the reference, relative to its largest value."""
    found, expected = case.found().double(), case.expected().double()
    if expected.numel() == 0:
        return 0.0
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-9))


def report(layer: Layer, share: float) -> bool:
    """Print one line for each operation; True if all equal their references."""
    fine = True
    for case in layer.cases(share):
        worst = error(case)
        fine &= worst < 2e-2
        low, median, high = milliseconds(case.run, layer.s)
        line = f"{share:4.1f}  {case.name:26s} error {worst:.1e}"
        line += f"  {median:8.4f} ms [{low:.4f}, {high:.4f}]"
        if case.dense is not None:
            _, dense, _ = milliseconds(case.dense, layer.s)
            line += f"  dense {dense:8.4f} ms  speed-up {dense / median:5.2f}"
            if layer.s.tokens > 1:
                line += f"  of bound {dense / median * share:4.2f}"
        print(line if worst < 2e-2 else f"{line}  WRONG", flush=True)
    return fine


def main(words: list[str]) -> int:
    """0 if every kernel equals its reference, 1 if not, 2 for a user mistake or no GPU."""
    try:
        settings = settings_of(Settings(), words)
        if settings.past and settings.tokens > 1:
            raise ValueError("past is for decode: give tokens=1 too")
    except ValueError as mistake:
        print(mistake, file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("benchmarks/kernels.py needs CUDA: there is none on this machine", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bfloat16, {settings}")
    with torch.inference_mode():
        layer = Layer(settings)
        shares = SHARES if settings.tokens > 1 else (0.0, *SHARES)
        results = [report(layer, share) for share in shares]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
