"""Every public operation once, on meta tensors of a model's shape."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from methods.engine.ops.triton.attend_rows import attend
from methods.engine.ops.triton.linear_rows import linear_rows, linear_rows_add
from methods.engine.ops.triton.mlp_rows import swiglu_rows
from methods.engine.ops.triton.partition import partition
from methods.engine.ops.triton.route import (
    LinearScore,
    LowRank,
    forecast_bypassed,
    route_and_forecast,
)


class Sizes(NamedTuple):
    """A model and a forward."""

    batch: int
    tokens: int
    slots: int
    width: int
    mlp_width: int
    heads: int
    kv_heads: int
    head_dim: int
    rank: int = 100


LLAMA_8B = Sizes(8, 2048, 4096, 4096, 14336, 32, 8, 128)
SMOLLM2 = Sizes(4, 512, 512, 576, 1536, 9, 3, 64, rank=64)


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor without memory: reading a value of it on the host is an error."""
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_all(sizes: Sizes, dtype: torch.dtype, variants: bool = True) -> None:
    """One routed layer, and with `variants` the other forms of its operations."""
    rows, exact, whole = sizes.batch * sizes.tokens, torch.float32, torch.int64
    x, residual = (meta(rows, sizes.width, dtype=dtype) for _ in range(2))
    valid, mask = (meta(rows, dtype=torch.bool), meta(sizes.batch, sizes.tokens, dtype=torch.bool))
    order = partition(mask, mask, kernels="triton")
    score = LinearScore(meta(sizes.width, dtype=exact), 0.0, meta(dtype=exact))
    down, up = (
        meta(sizes.rank, sizes.width, dtype=exact),
        meta(sizes.width, sizes.rank, dtype=exact),
    )
    plain = LowRank(down, up, meta(sizes.width, dtype=exact))
    published = plain._replace(down_bias_r=meta(sizes.rank, dtype=exact), silu=True)
    each = {"tokens": sizes.tokens, "kernels": "triton"}
    route_and_forecast(x, residual, valid, score, plain, **each)
    if variants:
        route_and_forecast(x, residual, valid, score, published, **each)
        route_and_forecast(x, residual, valid, score, None, **each)
        forecast_bypassed(x, residual, valid, valid, published, **each)

    index, count = order.index_N, order.executed
    gate, lift = (meta(sizes.mlp_width, sizes.width, dtype=dtype) for _ in range(2))
    swiglu_rows(
        x, residual, index, count, gate, lift, meta(sizes.width, sizes.mlp_width, dtype=dtype),
        kernels="triton",
    )  # fmt: skip
    inner = sizes.heads * sizes.head_dim
    bias = meta(inner, dtype=dtype)
    into = meta(inner, sizes.width, dtype=dtype)
    query = linear_rows(x, index, count, into, bias, kernels="triton")
    cache = [
        meta(sizes.batch, sizes.kv_heads, sizes.slots, sizes.head_dim, dtype=dtype) for _ in "kv"
    ]
    query = query.view(rows, sizes.heads, sizes.head_dim)
    arguments = (query, index, order.counts_B, order.starts_B, *cache)
    pads = meta(sizes.batch, dtype=whole)
    kinds = [
        {"past": sizes.slots - sizes.tokens, "first_valid_B": pads},
        {"past": sizes.slots - sizes.tokens, "window": 1000},
        {"past": meta(dtype=whole)},
        {"past": pads, "compact": True, "first_N": meta(rows, dtype=whole)},
    ]
    for options in kinds[: None if variants else 1]:
        out = attend(*arguments, **options, tokens=sizes.tokens, scale=0.1, kernels="triton")
    back = meta(sizes.width, inner, dtype=dtype)
    linear_rows_add(out.flatten(1), residual, index, count, back, kernels="triton")
