"""The row-wise operations as compiled loops; what a loop does not cover takes the PyTorch way."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from methods.base import LinearUnit, SwiGLU
from methods.engine.ops.cpu.build import MAX_HEAD, MAX_RANK, PANEL, library
from methods.engine.ops.linear import transposed
from methods.engine.ops.rotary import Angles
from methods.engine.ops.row_ops import RowOps, is_plain_rms
from methods.engine.ops.rows import Rows

LANES = 16
"""Packed rows are a multiple of this."""
MOST_PACKED = 2**20
"""Rows times width that the MLP packs: more leave the cache, and the library is as fast."""
FEW_QUERIES = 8
"""Fewer do not pay for the keys that the attention loop copies."""


class CompiledRowOps(RowOps):
    """`RowOps` for one precision on a CPU, float32 here, without gradient.

    Loops write where row numbers point: each is checked against its buffers before any work.

    Raises:
        NoCompiler: the loops cannot be compiled here.
        IndexError: by an operation; row numbers or tensors that do not fit each other.
    """

    compiled = True
    lanes = LANES
    """Widths and ranks of the forecast and heads in attention are a multiple of this."""
    packed_rows = MOST_PACKED
    """That the MLP packs at a time, a multiple of `LANES`."""
    copies = 1
    """Of keys alone, or of keys and values: what attention copies."""

    def __init__(self) -> None:
        self.loops: ctypes.CDLL = library(self.dtype)

    def plain(self, *tensors: Tensor) -> bool:
        """True for tensors that the loops can read, laid out in any way."""
        return _plain(self.dtype, tensors)

    def covers(self, *tensors: Tensor) -> bool:
        """True if loops may read and write these from their first address on."""
        for tensor in tensors:
            if not tensor.is_contiguous():
                return False
        return _plain(self.dtype, tensors)

    def norm(self, module: Any, x: Tensor) -> Tensor:
        """One pass; PyTorch takes three."""
        if not is_plain_rms(module) or not self.covers(x, module.weight):
            return super().norm(module, x)
        out = torch.empty_like(x)
        self._norm(module, x, out, None, None, None)
        return out

    def normed_scores(
        self, module: Any, x_BTD: Tensor, score_D: Tensor, offset: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Scores are taken from rows that the norm has just written."""
        covered = is_plain_rms(module) and self.covers(x_BTD, module.weight)
        if not covered or not _floats(score_D, offset):
            return super().normed_scores(module, x_BTD, score_D, offset)
        out, scores_BT = torch.empty_like(x_BTD), score_D.new_empty(x_BTD.shape[:-1])
        _require(score_D.shape == x_BTD.shape[-1:])
        self._norm(module, x_BTD, out, score_D, offset, scores_BT)
        return out, scores_BT

    def _norm(self, module: Any, x: Tensor, out: Tensor, *scoring: Tensor | None) -> None:
        width = x.shape[-1]
        _require(module.weight.shape == x.shape[-1:])
        rows = x.numel() // width
        self.loops.rms_norm(x, module.weight, module.variance_epsilon, out, rows, width, *scoring)

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """One pass; PyTorch takes two."""
        if not self.covers(gate, up):
            return super().silu_mul(gate, up)
        _require(gate.shape == up.shape)
        self.loops.silu_mul(gate, up, gate.numel())
        return gate

    def mlp(self, weights: SwiGLU, x_RD: Tensor, index_N: Tensor | None = None) -> Tensor:
        """Weights are read where they lie; the library packs them for rows that are too few."""
        count = (x_RD if index_N is None else index_N).shape[0]
        if not self.few(weights, x_RD, count):
            return super().mlp(weights, x_RD, index_N)
        out = x_RD.new_empty(count, x_RD.shape[-1])
        self._mlp(weights, x_RD, index_N, count, None, out)
        return out

    def add_mlp(
        self,
        weights: SwiGLU,
        x_BTD: Tensor,
        residual_BTD: Tensor,
        into_BTD: Tensor,
        index_N: Tensor,
    ) -> None:
        """The last product writes to the stream."""
        count = index_N.shape[0]
        if not self.few(weights, x_BTD, count) or not self.covers(residual_BTD, into_BTD):
            super().add_mlp(weights, x_BTD, residual_BTD, into_BTD, index_N)
            return
        _require(x_BTD.shape == residual_BTD.shape == into_BTD.shape)
        self._mlp(weights, x_BTD, index_N, count, residual_BTD, into_BTD)

    def few(self, weights: SwiGLU, x: Tensor, count: int) -> bool:
        """True if the MLP's loop is the faster way for so many rows of x, and covers them."""
        fits = count > 0 and count * x.shape[-1] <= MOST_PACKED
        return fits and self.covers(x, *weights)

    def _mlp(
        self,
        weights: SwiGLU,
        x: Tensor,
        index_N: Tensor | None,
        count: int,
        residual: Tensor | None,
        out: Tensor,
    ) -> None:
        neurons, width = weights.gate_FD.shape
        _require(x.shape[-1] == width)
        packed = min(-(-count // LANES) * LANES, self.packed_rows)
        scratch = x.new_empty(packed * (width + neurons))
        held = x.numel() // width
        self.loops.mlp(x, held, count, index_N, *weights, residual, scratch, out, width, neurons)

    def rotate(self, x: Tensor, angles: Angles, out: Tensor | None = None) -> Tensor:
        """One pass, angles read where they are; PyTorch takes three and two gathers."""
        into = torch.empty_like(x) if out is None else out
        whole = angles.cos_Pd.shape[1] == x.shape[-1]
        lies = whole and into.stride(-1) == 1 and into.dim() in (3, 4)
        if not (lies and self.plain(into) and self.covers(x, angles.cos_Pd, angles.sin_Pd)):
            return super().rotate(x, angles, out)
        *_, tokens, heads, size = x.shape
        place, gaps, rows = angles.place_N, into.stride()[:-1], x.numel() // (heads * size)
        period, width = angles.cos_Pd.shape
        _require(into.shape == x.shape and size == width and angles.sin_Pd.shape[0] == period)
        _require(place is None or place.shape[0] == rows)
        self.loops.rotate(
            *(x, angles.cos_Pd, angles.sin_Pd, place, period, into),
            *(gaps if len(gaps) == 3 else (0, *gaps)),
            *(rows, tokens, heads, size),
        )
        return into

    def split(self, execute_BT: Tensor, valid_BT: Tensor) -> tuple[Rows, Tensor]:
        """One pass over the two masks."""
        if not (execute_BT.is_cpu and valid_BT.is_cpu and execute_BT.dtype is torch.bool):
            return super().split(execute_BT, valid_BT)
        execute_BT, valid_BT = execute_BT.contiguous(), valid_BT.contiguous()
        _require(execute_BT.shape == valid_BT.shape)
        batch, tokens = execute_BT.shape
        found = torch.empty(2 * batch * tokens, dtype=torch.int64)  # executed, then bypassed ones
        numbers = (ctypes.c_int64 * (batch + 1))()
        self.loops.partition(execute_BT, valid_BT, found, numbers, batch, tokens)
        *counts, others = numbers
        rows = Rows(found.narrow(0, 0, sum(counts)), counts, tokens)
        return rows, found.narrow(0, batch * tokens, others)

    def output_buffer(self, residual_BTD: Tensor, filled: bool) -> Tensor:
        """Nothing is copied where every row is written anyway."""
        if not filled or not self.covers(residual_BTD):
            return super().output_buffer(residual_BTD, filled)
        return torch.empty_like(residual_BTD)

    def add(
        self, residual_BTD: Tensor, into_BTD: Tensor, index_N: Tensor, delta_ND: Tensor
    ) -> None:
        """Rows in parallel."""
        if not self.covers(residual_BTD, into_BTD):
            super().add(residual_BTD, into_BTD, index_N, delta_ND)
            return
        if not self.covers(delta_ND):
            delta_ND = delta_ND.to(self.dtype).contiguous()
        count, width = delta_ND.shape
        _require(residual_BTD.shape == into_BTD.shape and residual_BTD.shape[-1] == width)
        _require(index_N.shape[0] == count)
        held = residual_BTD.numel() // width
        self.loops.add_rows(residual_BTD, into_BTD, held, index_N, delta_ND, count, width)

    def attend(
        self, query_NHd: Tensor, key_KSd: Tensor, value_KSd: Tensor, last_N: Tensor, scale: float
    ) -> Tensor | None:
        """Block by block without a mask; keys are copied once, by columns."""
        number, heads, size = query_NHd.shape
        fits = size % self.lanes == 0 and size <= MAX_HEAD and last_N.shape[0] >= FEW_QUERIES
        lie = key_KSd.stride(2) == value_KSd.stride(2) == 1
        if not (fits and lie and self.plain(query_NHd, key_KSd, value_KSd)):
            return None
        kv_heads, held, _ = key_KSd.shape
        _require(key_KSd.shape == value_KSd.shape and key_KSd.shape[2] == size)
        _require(last_N.shape[0] == number and heads % kv_heads == 0)
        query_NHd = query_NHd.contiguous()
        out = torch.empty_like(query_NHd)
        scratch = out.new_empty(self.copies, kv_heads, -(-held // PANEL) * PANEL, size)
        self.loops.attend(
            *(query_NHd, key_KSd, *key_KSd.stride()[:2], value_KSd, *value_KSd.stride()[:2]),
            *(last_N, scale, scratch, out, held, number, heads, kv_heads, size),
        )
        return out

    def attend_one(
        self,
        query_Hd: Tensor,
        key_KSd: Tensor,
        value_KSd: Tensor,
        mask: Tensor | None,
        scale: float,
    ) -> Tensor:
        """One pass over keys and values by this thread, unless they are many."""
        lie = key_KSd.stride(2) == value_KSd.stride(2) == 1 and query_Hd.is_contiguous()
        if mask is not None or not (lie and self.plain(query_Hd, key_KSd, value_KSd)):
            return super().attend_one(query_Hd, key_KSd, value_KSd, mask, scale)
        (heads, size), (kv_heads, held, _) = query_Hd.shape, key_KSd.shape
        _require(key_KSd.shape == value_KSd.shape and key_KSd.shape[2] == size)
        _require(heads % kv_heads == 0)
        out, scores_HS = torch.empty_like(query_Hd), query_Hd.new_empty(heads, held)
        self.loops.attend_one(
            *(query_Hd, key_KSd, *key_KSd.stride()[:2], value_KSd, *value_KSd.stride()[:2]),
            *(scale, scores_HS, out, held, heads, kv_heads, size),
        )
        return out

    def forecast(
        self,
        linear: LinearUnit,
        x_BTD: Tensor,
        residual_BTD: Tensor,
        into_BTD: Tensor,
        index_N: Tensor,
    ) -> None:
        """Tiles of rows through both maps; PyTorch gathers, keeps intermediates and scatters."""
        down, up = linear.down_rD, linear.up_Dr
        if down is None or up is None:
            return
        width = down.shape[1]
        biases = [bias for bias in (linear.down_bias_r, linear.bias_D) if bias is not None]
        lie = self.lie(down, up) and _floats(*biases)
        lie = lie and self.covers(x_BTD, residual_BTD, into_BTD)
        if not (self.sized(down) and lie):
            super().forecast(linear, x_BTD, residual_BTD, into_BTD, index_N)
            return
        _require(x_BTD.shape == residual_BTD.shape == into_BTD.shape and x_BTD.shape[-1] == width)
        self.loops.forecast(
            *(x_BTD, residual_BTD, into_BTD, x_BTD.numel() // width, index_N, index_N.shape[0]),
            *(down, linear.down_bias_r, up, linear.bias_D, width, down.shape[0], linear.silu),
        )

    def sized(self, down_rD: Tensor) -> bool:
        """True for sizes that the forecast's loop takes."""
        rank, width = down_rD.shape
        return rank % self.lanes == 0 and width % self.lanes == 0 and rank <= MAX_RANK

    def maps(self, linear: LinearUnit) -> LinearUnit:
        """Both maps column by column."""
        return transposed(linear)

    def lie(self, down_rD: Tensor, up_Dr: Tensor) -> bool:
        """True if the maps lie as `maps` gives them."""
        (rank, width), plain = down_rD.shape, self.plain(down_rD, up_Dr)
        return plain and down_rD.stride() == (1, rank) and up_Dr.stride() == (1, width)


def _require(fits: bool) -> None:
    if not fits:
        raise IndexError("the tensors of a row-wise operation do not fit each other")


def _plain(dtype: torch.dtype, tensors: tuple[Tensor, ...]) -> bool:
    """True for this precision on the host, where nothing is differentiated."""
    for tensor in tensors:  # a loop: this is asked for every operation of every unit
        if tensor.dtype is not dtype or not tensor.is_cpu:
            return False
    return not torch.is_grad_enabled()


def _floats(*tensors: Tensor) -> bool:
    """True for what a loop reads in float32, whatever the model's precision."""
    return _plain(torch.float32, tensors) and all(tensor.is_contiguous() for tensor in tensors)
