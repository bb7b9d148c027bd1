"""Time each compiled loop of the CPU path against the PyTorch operations it stands for, in turn.

python benchmarks/loops.py --tokens 2048 --sparsity 0.5

The defaults are a layer of SmolLM2-135M, rank 64. Ratios are medians.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # run the code of this clone, whichever clone's environment it is
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from methods.base import LinearUnit, SwiGLU
from methods.engine.ops.cpu.build import NoCompiler
from methods.engine.ops.cpu.compiled import CompiledRowOps
from methods.engine.ops.linear import transposed
from methods.engine.ops.rotary import Angles
from methods.engine.ops.row_ops import RowOps
from runners.timing.stopwatch import interleaved, ratio, timed

CPU = torch.device("cpu")


SIZES = {"tokens": 2048, "width": 576, "mlp-width": 1536, "heads": 9, "kv-heads": 3}
SIZES |= {"head-dim": 64, "rank": 64, "repeats": 30}


def cases(s: argparse.Namespace) -> dict[str, Callable[[RowOps], object]]:
    """Name of an operation -> what runs it."""
    index = (torch.rand(s.tokens) >= s.sparsity).nonzero().squeeze(1)
    execute = torch.zeros(1, s.tokens, dtype=torch.bool)
    execute[0, index] = True
    valid, others = torch.ones_like(execute), (~execute[0]).nonzero().squeeze(1)
    x, residual = torch.randn(1, s.tokens, s.width), torch.randn(1, s.tokens, s.width)
    norm, into, score = LlamaRMSNorm(s.width), residual.clone(), torch.randn(s.width)
    down, up = torch.randn(s.rank, s.width), torch.randn(s.width, s.rank)
    maps = LinearUnit(score, torch.zeros(()), down, torch.randn(s.rank), up, torch.randn(s.width))
    loops = transposed(maps)
    angle = torch.randn(s.tokens, s.head_dim)
    angles = Angles(angle.cos(), angle.sin()).at(index)
    query = torch.randn(len(index), s.heads, s.head_dim)
    key, value = (torch.randn(s.kv_heads, s.tokens, s.head_dim) for _ in range(2))
    gate, wide = (torch.randn(len(index), s.mlp_width) for _ in range(2))
    inner, outer = (s.mlp_width, s.width), (s.width, s.mlp_width)
    weights = SwiGLU(*map(torch.randn, (inner, inner, outer)))
    return {
        "norm": lambda ops: ops.norm(norm, x),
        "norm, scores": lambda ops: ops.normed_scores(norm, x, score, torch.zeros(())),
        "mlp": lambda ops: ops.add_mlp(weights, x, residual, into, index),
        "split": lambda ops: ops.split(execute, valid),
        "silu_mul": lambda ops: ops.silu_mul(gate.copy_(wide), wide),
        "rotate": lambda ops: ops.rotate(query, angles),
        "add": lambda ops: ops.add(residual, into, index, x[0, : len(index)]),
        "forecast": lambda ops: ops.forecast(
            loops if ops.compiled else maps, x, residual, into, others
        ),
        "attend": lambda ops: attend(ops, query, key, value, index),
    }


def attend(ops: RowOps, query: Tensor, key: Tensor, value: Tensor, last_N: Tensor) -> object:
    """With one mask for all queries where there is no loop."""
    done = ops.attend(query, key, value, last_N, query.shape[-1] ** -0.5)
    if done is not None:
        return done
    mask = torch.arange(key.shape[1]) <= last_N[:, None]
    return functional.scaled_dot_product_attention(
        query.transpose(0, 1), key, value, attn_mask=mask, enable_gqa=True
    )


@torch.no_grad()
def main(words: list[str] | None = None) -> None:
    """Print a line for each operation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sparsity", type=float, default=0.5, help="in [0, 1), default 0.5")
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    settings = parser.parse_args(words)
    if not 0 <= settings.sparsity < 1:
        parser.error("--sparsity must lie in [0, 1)")
    try:
        compiled = CompiledRowOps()
    except NoCompiler as problem:
        parser.error(str(problem))
    torch.manual_seed(0)
    plain = RowOps()
    for name, run in cases(settings).items():
        slow, fast = interleaved(
            [partial(timed, partial(run, ops), CPU) for ops in (plain, compiled)],
            device=CPU,
            warmup=1,
            repeats=settings.repeats,
            label=name,
        )
        times = [side.median * 1e6 for side in (slow, fast)]
        gain = ratio(slow, fast)["median"]
        print(f"{name:12} PyTorch {times[0]:8.0f} us   loop {times[1]:8.0f} us   {gain:.2f} x")


if __name__ == "__main__":
    main()
