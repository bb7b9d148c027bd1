"""Check each kernel against its reference on a GPU, and time it against dense PyTorch.

python benchmarks/kernels.py --batch 1 --tokens 2048

The defaults are a layer of Llama-3.1-8B in bfloat16. Decode is `--tokens 1 --past 4096`, where
times are those of a replayed CUDA graph. Ends with exit code 1 if a kernel differs from its
reference. With TRITON_INTERPRET=1 it runs without a GPU, at tiny sizes, and times mean nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # run the code of this clone, whichever clone's environment it is
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from methods.base import LinearUnit, SwiGLU
from methods.engine.ops.choose import interpreting
from methods.engine.ops.triton.attend_rows import attend
from methods.engine.ops.triton.linear_rows import linear_rows, linear_rows_add, swiglu_rows
from methods.engine.ops.triton.route import partition, route_and_forecast
from methods.engine.ops.triton.types import Sight
from runners.timing.stopwatch import timed

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = {"batch": 1, "tokens": 2048, "past": 0, "width": 4096, "mlp-width": 14336, "heads": 32}
SIZES |= {"kv-heads": 8, "head-dim": 128, "rank": 100}
SHARES = (0.3, 0.5, 0.7, 1.0)
NAMES = ("partition", "router+forecast+partition", "q rows", "attend", "o rows", "mlp rows")
TOLERANCE = 2e-2
SAMPLE = 256
"""Queries of an attention that are compared with the reference."""
GAP = 16
"""Places around the wanted threshold that are searched for one no rounding can cross."""


class Case(NamedTuple):
    """One operation, and the dense work that it replaces."""

    name: str
    run: Callable[[str, Tensor], Tensor]
    """(kernels, residual stream that it may add to) -> what is compared."""
    dense: Callable[[], object] | None = None
    seen: Tensor | slice = slice(None)
    """Rows that are compared."""
    reference: Callable[[], Tensor] | None = None
    """Those rows, where `run` itself would take too long or too much memory."""


normal = partial(torch.randn, device=DEVICE, dtype=torch.bfloat16)


def weights(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Normal numbers scaled by the last dimension."""
    return normal(*shape, dtype=dtype) / shape[-1] ** 0.5


class Layer:
    """Weights, activations and a cache."""

    def __init__(self, s: argparse.Namespace) -> None:
        self.s, inner = s, s.heads * s.head_dim
        rows, exact = s.batch * s.tokens, torch.float32
        self.x, self.residual = normal(rows, s.width), normal(rows, s.width)
        gate, up = weights(s.mlp_width, s.width), weights(s.mlp_width, s.width)
        self.mlp = SwiGLU(gate, up, weights(s.width, s.mlp_width))
        self.q, self.o = weights(inner, s.width), weights(s.width, inner)
        self.query = normal(rows, s.heads, s.head_dim)
        cache = (s.batch, s.kv_heads, s.past + s.tokens, s.head_dim)
        self.key, self.value = normal(*cache), normal(*cache)
        self.valid = torch.ones(s.batch, s.tokens, dtype=torch.bool, device=DEVICE)
        self.linear = LinearUnit(
            weights(s.width, dtype=exact),
            torch.zeros((), device=DEVICE),
            down_rD=weights(s.rank, s.width, dtype=exact),
            up_Dr=weights(s.width, s.rank, dtype=exact),
            bias_D=weights(s.width, dtype=exact),
        )

    def cases(self, share: float) -> list[Case]:
        """Every operation at this share of executed tokens, in one random draw."""
        s, x, query = self.s, self.x, self.query.flatten(1)
        execute = torch.rand(s.batch, s.tokens, device=DEVICE) < share
        order = partition(execute, self.valid, kernels="torch")
        used = order.index_N.new_ones(len(x)).cumsum(0) <= order.executed
        sample = used.nonzero()[:, 0]
        sample = sample[torch.randperm(len(sample), device=DEVICE)[:SAMPLE].sort().values]
        index = order.index_N[sample]
        counts = (index // s.tokens).bincount(minlength=s.batch)
        some = order._replace(index_N=index, counts_B=counts, starts_B=counts.cumsum(0) - counts)
        threshold, valid = self.threshold(share), self.valid.flatten()
        sight, scale = Sight(s.tokens, s.past), s.head_dim**-0.5
        cache = (self.key, self.value, sight)

        def added(run: Callable[..., object], *arguments: Any, **named: Any) -> Any:
            def to(kernels: str, out: Tensor) -> Tensor:
                run(arguments[0], out, *arguments[1:], **named, kernels=kernels)
                return out

            return to

        routing = (x, valid, self.linear, threshold)
        q, o = partial(functional.linear, x, self.q), partial(functional.linear, query, self.o)
        return [
            Case(NAMES[0], lambda k, _: partition(execute, self.valid, kernels=k).index_N),
            Case(NAMES[1], added(route_and_forecast, *routing, tokens=s.tokens)),
            Case(NAMES[2], lambda k, _: linear_rows(x, order, self.q, kernels=k), q, used),
            Case(
                NAMES[3],
                lambda k, _: attend(self.query, order, *cache, scale=scale, kernels=k),
                self.dense_attention,
                sample,
                lambda: attend(self.query[sample], some, *cache, scale=scale, kernels="torch"),
            ),
            Case(NAMES[4], added(linear_rows_add, query, order, self.o), o),
            Case(NAMES[5], added(swiglu_rows, x, order, self.mlp), self.dense_mlp),
        ]

    def threshold(self, share: float) -> Tensor:
        """About the quantile that executes `share`, where the scores leave the widest gap."""
        scores = (self.x.float() @ self.linear.score_D).sort(descending=True).values
        ends = torch.tensor([float("inf")], device=DEVICE)
        scores = torch.cat((ends, scores, -ends)).clamp(-1e3, 1e3)
        place = round(share * len(self.x))
        inside = slice(max(place - GAP, 0), place + GAP + 2)
        near = scores[inside] if 0 < share < 1 else scores[place:][:2]
        widest = (near[:-1] - near[1:]).argmax()
        return (near[widest] + near[widest + 1]) / 2

    def dense_mlp(self) -> Tensor:
        middle = functional.silu(functional.linear(self.x, self.mlp.gate_FD))
        middle = middle * functional.linear(self.x, self.mlp.up_FD)
        return self.residual + functional.linear(middle, self.mlp.down_DF)

    def dense_attention(self) -> Tensor:
        query = self.query.unflatten(0, (self.s.batch, self.s.tokens)).transpose(1, 2)
        return functional.scaled_dot_product_attention(
            query, self.key, self.value, is_causal=self.s.tokens > 1, enable_gqa=True
        )


def milliseconds(run: Callable[[], object], decodes: bool, repeats_ms: int) -> list[float]:
    """p20, median and p80, the cache flushed; decode replays a graph, launches would hide it."""
    if DEVICE.type == "cpu":
        return [1e3 * timed(run, DEVICE)] * 3
    from triton.testing import do_bench

    if decodes:
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        run = graph.replay
    found: list[float] = do_bench(run, rep=repeats_ms, quantiles=[0.2, 0.5, 0.8])
    return found


def error(case: Case, residual: Tensor) -> float:
    """Largest difference from the reference, relative to its largest value."""
    found = case.run("triton", residual.clone())[case.seen].double()
    reference = case.reference or (lambda: case.run("torch", residual.clone())[case.seen])
    expected = reference().double()
    if expected.numel() == 0:
        return 0.0
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-9))


def measure(case: Case, layer: Layer) -> dict[str, Any]:
    """Compare one kernel with its reference, then time it and the dense work that it replaces."""
    decodes, repeats = layer.s.tokens == 1, layer.s.repeats_ms
    worst, scratch = error(case, layer.residual), layer.residual.clone()
    low, median, high = milliseconds(partial(case.run, "triton", scratch), decodes, repeats)
    found: dict[str, Any] = {"error": worst, "correct": worst < TOLERANCE}
    found |= {"ms": median, "ms_p20": low, "ms_p80": high}
    if case.dense is not None:
        _, dense, _ = milliseconds(case.dense, decodes, repeats)
        found |= {"dense_ms": dense, "speedup": dense / median}
    return found


def report(case: Case, layer: Layer, share: float) -> bool:
    """Print one line; True if the kernel equals its reference."""
    found = measure(case, layer)
    line = f"{share:4.1f}  {case.name:26s} error {found['error']:.1e}"
    line += f"  {found['ms']:8.4f} ms [{found['ms_p20']:.4f}, {found['ms_p80']:.4f}]"
    if case.dense is not None:
        line += f"  dense {found['dense_ms']:8.4f} ms  speed-up {found['speedup']:5.2f}"
        line += "" if layer.s.tokens == 1 else f"  of bound {found['speedup'] * share:4.2f}"
    print(line if found["correct"] else f"{line}  WRONG", flush=True)
    return bool(found["correct"])


def tuned() -> dict[str, dict[str, int]]:
    """Tiles that were found fastest on this device, by what each choice depends on."""
    from methods.engine.ops.triton import attend_rows_kernel, linear_rows_kernel

    tuners = {"attend": attend_rows_kernel.tuner, "rows": linear_rows_kernel.tuner}
    best = [(n, key, tiles) for n, tuner in tuners.items() for key, tiles in tuner.best.items()]
    return {f"{name} {key}": tiles._asdict() for name, key, tiles in best}


def sizes_parser() -> argparse.ArgumentParser:
    """A layer's sizes, and how long it is timed."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--repeats-ms", type=int, default=100, help="time spent on each timing")
    return parser


def main(words: list[str] | None = None) -> int:
    """0 if every kernel equals its reference, 1 if not."""
    parser = sizes_parser()
    s = parser.parse_args(words)
    if s.past and s.tokens > 1:
        parser.error("--past is for decode: give --tokens 1 too")
    if DEVICE.type == "cpu" and not interpreting():
        parser.error("needs CUDA: there is none on this machine")
    torch.manual_seed(0)
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "interpreted"
    print(f"{name}, torch {torch.__version__}, bfloat16, {vars(s)}")
    with torch.inference_mode():
        layer = Layer(s)
        shares = SHARES if s.tokens > 1 else (0.0, *SHARES)
        fine = [report(case, layer, share) for share in shares for case in layer.cases(share)]
    return 0 if all(fine) else 1


if __name__ == "__main__":
    sys.exit(main())
