"""Row-wise work between the matrix products of a gathered forward, in PyTorch.

`CompiledRowOps` does the same on a CPU in one pass over memory each, to float tolerance;
`TiledRowOps` in bfloat16.

Shapes: B sequences, T tokens, N gathered rows, D width, r rank, F MLP width, d head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from methods.base import LinearUnit, SwiGLU
from methods.engine.ops.linear import estimate
from methods.engine.ops.rotary import Angles, rotate
from methods.engine.ops.rows import Rows, take

CHUNK_ROWS = 512
ALIGNED_ROWS = 16
"""Rows of a transposed product are a multiple of this, so that its rows begin at a cache line."""


class RowOps:
    """The operations, each a method."""

    compiled = False
    dtype = torch.float32
    """What `mlp` stands for a module in, and all that compiled operations cover."""
    mlp_rows = 1024
    """Up to here `mlp` is faster than the library's x @ W.T on a CPU, at widths 576 and 1536;
    beyond, as fast."""
    forecasts_all = False
    """Whether `forecast` of all rows is faster than the library's two products."""

    def norm(self, module: Any, x: Tensor) -> Tensor:
        """The norm of a layer on [..., D], equal to its module to float tolerance.

        In float32 without gradient, root mean square norms (Zhang and Sennrich, arXiv 1910.07467)
        skip the intermediates of the module: on a CPU it writes the activations five times where
        two do, and for one token it takes six operations where three do.
        """
        if x.dtype != torch.float32 or not is_plain_rms(module):
            return MODULES.norm(module, x)
        if x.device.type == "cpu" and x.numel() == x.shape[-1]:
            flat = x.reshape(-1)
            mean_square = float(torch.dot(flat, flat)) / len(flat)
            return (x * module.weight).mul_((mean_square + module.variance_epsilon) ** -0.5)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = length.square_().div_(x.shape[-1]).add_(module.variance_epsilon).rsqrt_()
        return (x * scale).mul_(module.weight)

    def scores(self, x_BTD: Tensor, score_D: Tensor, offset: Tensor) -> Tensor:
        """x @ score + offset, float32 [B, T]; `offset` is 0-dim."""
        return torch.matmul(x_BTD.float(), score_D).add_(offset)

    def normed_scores(
        self, module: Any, x_BTD: Tensor, score_D: Tensor, offset: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The norm of x, and the scores of that."""
        normed_BTD = self.norm(module, x_BTD)
        return normed_BTD, self.scores(normed_BTD, score_D, offset)

    def linears(self, modules: Sequence[Any], x: Tensor) -> list[Tensor]:
        """Projections of the same rows, [..., inputs] -> [..., outputs] each."""
        return [module(x) for module in modules]

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) * up, written to `gate`."""
        return functional.silu(gate, inplace=True).mul_(up)

    def mlp(self, weights: SwiGLU, x_RD: Tensor, index_N: Tensor | None = None) -> Tensor:
        """down(silu(gate(x)) * up(x)) of a few rows, [N, D]; of all without an index.

        Every product is transposed: with few rows, the library splits W @ x.T between threads
        better than x @ W.T, along the longer side. Measured at widths 576 and 1536.
        """
        x_ND = x_RD if index_N is None else x_RD.index_select(0, index_N)
        missing = _aligned(len(x_ND)) - len(x_ND)
        rows_ND = functional.pad(x_ND, (0, 0, 0, missing)) if missing else x_ND
        out = torch.empty_like(rows_ND)
        chunks = -(-len(rows_ND) // CHUNK_ROWS)
        rows = _aligned(-(-len(rows_ND) // chunks))
        for x, into in zip(rows_ND.split(rows), out.split(rows), strict=True):
            hidden_FN = self.silu_mul(weights.gate_FD @ x.t(), weights.up_FD @ x.t())
            torch.mm(hidden_FN.t(), weights.down_DF.t(), out=into)
        return out[: len(x_ND)]

    def add_mlp(
        self,
        weights: SwiGLU,
        x_BTD: Tensor,
        residual_BTD: Tensor,
        into_BTD: Tensor,
        index_N: Tensor,
    ) -> None:
        """into[index] = residual[index] + the MLP of x[index], as `add`."""
        found = self.mlp(weights, x_BTD.flatten(0, 1), index_N)
        self.add(residual_BTD, into_BTD, index_N, found)

    def rotate(self, x: Tensor, angles: Angles, out: Tensor | None = None) -> Tensor:
        """Rotary embedding of [..., heads, d], rows in the order of the leading axes.

        Args:
            out: written to and returned, of the same shape and laid out in any way.
        """
        cos, sin, place_N = angles.cos_Pd, angles.sin_Pd, angles.place_N
        if place_N is None:
            rows = x.view(-1, len(cos), *x.shape[-2:])
        else:
            rows = x.view(-1, *x.shape[-2:])
            cos, sin = cos.index_select(0, place_N), sin.index_select(0, place_N)
        rotated = rotate(rows, cos.unsqueeze(1), sin.unsqueeze(1)).view_as(x)
        return rotated if out is None else out.copy_(rotated)

    def split(self, execute_BT: Tensor, valid_BT: Tensor) -> tuple[Rows, Tensor]:
        """Executed tokens, and the places b * T + t of real ones that are bypassed, int64."""
        batch, tokens = execute_BT.shape
        index_N = execute_BT.flatten().nonzero().squeeze(1)
        counts = [len(index_N)] if batch == 1 else execute_BT.sum(1).tolist()
        rows = Rows(index_N, counts, tokens)
        if rows.number == execute_BT.numel():
            return rows, index_N[:0]
        return rows, (valid_BT & ~execute_BT).flatten().nonzero().squeeze(1)

    def output_buffer(self, residual_BTD: Tensor, filled: bool) -> Tensor:
        """Where the next residual stream is made, before `add` and `forecast`.

        Args:
            filled: these two will write every row.
        """
        return residual_BTD.clone()

    def add(
        self, residual_BTD: Tensor, into_BTD: Tensor, index_N: Tensor, delta_ND: Tensor
    ) -> None:
        """into[index] = residual[index] + delta; `into` is an `output_buffer` or the residual."""
        delta_ND = delta_ND.to(into_BTD.dtype)
        into_BTD.view(-1, into_BTD.shape[-1]).index_add_(0, index_N, delta_ND)

    def attend(
        self, query_NHd: Tensor, key_KSd: Tensor, value_KSd: Tensor, last_N: Tensor, scale: float
    ) -> Tensor | None:
        """Attention of queries that see keys 0 .. last each, rising; [N, H, d].

        None leaves it to the library's kernel, which wants a mask.
        """
        return None

    def attend_one(
        self,
        query_Hd: Tensor,
        key_KSd: Tensor,
        value_KSd: Tensor,
        mask: Tensor | None,
        scale: float,
    ) -> Tensor:
        """Attention of one query, [H, d]; heads that share a key are rows of it.

        Args:
            mask: bool or additive, [1, 1, 1, S]; None sees every key.
        """
        heads, size = query_Hd.shape
        out = functional.scaled_dot_product_attention(
            query_Hd.view(1, key_KSd.shape[0], -1, size),
            key_KSd[None],
            value_KSd[None],
            attn_mask=mask,
            scale=scale,
        )
        return out.reshape(heads, size)

    def forecast(
        self,
        linear: LinearUnit,
        x_BTD: Tensor,
        residual_BTD: Tensor,
        into_BTD: Tensor,
        index_N: Tensor,
    ) -> None:
        """into[index] = residual[index] + the estimate from x[index], if the site makes one."""
        found = estimate(linear, take(x_BTD, index_N))
        if found is not None:
            self.add(residual_BTD, into_BTD, index_N, found)

    def maps(self, linear: LinearUnit) -> LinearUnit:
        """The same with its maps as `forecast` reads them."""
        return linear


def is_plain_rms(norm: Any) -> bool:
    """True for x / rms(x) * weight, by the attributes that the known families use."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if norm._forward_hooks or norm._forward_pre_hooks:
        return False
    return type(norm).__name__.endswith("RMSNorm") and hasattr(norm, "variance_epsilon")


def _aligned(rows: int) -> int:
    return -(-rows // ALIGNED_ROWS) * ALIGNED_ROWS


class ModuleOps(RowOps):
    """The same with the norms of the layers as their modules compute them: the masked reference."""

    def norm(self, module: Any, x: Tensor) -> Tensor:
        """The module's own output, on [..., D]."""
        out: Tensor = module(x)
        return out


MODULES = ModuleOps()
