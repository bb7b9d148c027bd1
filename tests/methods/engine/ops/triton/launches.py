"""Every public operation once, on meta tensors of a model's shape."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from methods.base import LinearUnit, SwiGLU
from methods.engine.ops.triton.attend_rows import attend
from methods.engine.ops.triton.linear_rows import linear_rows, linear_rows_add, swiglu_rows
from methods.engine.ops.triton.route import forecast_bypassed, partition, route_and_forecast
from methods.engine.ops.triton.types import Partition, Sight


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


def first(index_N: Tensor, count: Tensor) -> Partition:
    """An order whose first `count` rows are executed, as far as products of rows look at it."""
    return Partition(
        index_N, count, len(index_N) - count, count[None], torch.zeros_like(count)[None]
    )


def launch_all(sizes: Sizes, dtype: torch.dtype, variants: bool = True) -> None:
    """One routed layer, and with `variants` the other forms of its operations."""
    rows, exact, whole = sizes.batch * sizes.tokens, torch.float32, torch.int64
    x, residual = (meta(rows, sizes.width, dtype=dtype) for _ in range(2))
    valid, mask = (meta(rows, dtype=torch.bool), meta(sizes.batch, sizes.tokens, dtype=torch.bool))
    order = partition(mask, mask, kernels="triton")
    score = LinearUnit(meta(sizes.width, dtype=exact), meta(dtype=exact))
    plain = replace(
        score,
        down_rD=meta(sizes.rank, sizes.width, dtype=exact),
        up_Dr=meta(sizes.width, sizes.rank, dtype=exact),
        bias_D=meta(sizes.width, dtype=exact),
    )
    published = replace(plain, down_bias_r=meta(sizes.rank, dtype=exact), silu=True)
    threshold, each = meta(dtype=exact), {"tokens": sizes.tokens, "kernels": "triton"}
    route_and_forecast(x, residual, valid, plain, threshold, **each)
    if variants:
        route_and_forecast(x, residual, valid, published, threshold, **each)
        route_and_forecast(x, residual, valid, score, threshold, **each)
        forecast_bypassed(x, residual, valid, valid, published, **each)

    gate, lift = (meta(sizes.mlp_width, sizes.width, dtype=dtype) for _ in range(2))
    weights = SwiGLU(gate, lift, meta(sizes.width, sizes.mlp_width, dtype=dtype))
    swiglu_rows(x, residual, order, weights, kernels="triton")
    inner = sizes.heads * sizes.head_dim
    bias = meta(inner, dtype=dtype)
    into = meta(inner, sizes.width, dtype=dtype)
    query = linear_rows(x, order, into, bias, kernels="triton")
    cache = [
        meta(sizes.batch, sizes.kv_heads, sizes.slots, sizes.head_dim, dtype=dtype) for _ in "kv"
    ]
    query = query.view(rows, sizes.heads, sizes.head_dim)
    pads = meta(sizes.batch, dtype=whole)
    kinds = [
        {"past": sizes.slots - sizes.tokens, "first_valid_B": pads},
        {"past": sizes.slots - sizes.tokens, "window": 1000},
        {"past": meta(dtype=whole)},
        {"past": pads, "compact": True, "first_N": meta(rows, dtype=whole)},
    ]
    for options in kinds[: None if variants else 1]:
        sight = Sight(sizes.tokens, **options)
        out = attend(query, order, *cache, sight, scale=0.1, kernels="triton")
    back = meta(sizes.width, inner, dtype=dtype)
    linear_rows_add(out.flatten(1), residual, order, back, kernels="triton")
