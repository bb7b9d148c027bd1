"""Trained bypasses: what a token takes instead of a unit."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from methods.parts.gates import straight_through
from methods.types import Decision


class Adapter(nn.Module):
    """A narrow feed-forward network; float32 inside, output in the dtype of the input.

    Args:
        width: D of the model.
        hidden: inner width.
        kind: `swiglu` is up(silu(gate x) * (into x)) without biases, the shape of a Llama MLP
            (FlexiDepth); `silu` is Linear -> SiLU -> Linear (HeRo).
    """

    def __init__(self, *, width: int, hidden: int, kind: Literal["swiglu", "silu"]) -> None:
        super().__init__()
        if hidden < 1:
            raise ValueError(f"an adapter needs a hidden width of at least 1, not {hidden}")
        bias = kind == "silu"
        self.gate = nn.Linear(width, hidden, bias=False) if kind == "swiglu" else None
        self.into = nn.Linear(width, hidden, bias=bias)
        self.up = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        wide = x.float()
        inner = self.into(wide)
        inner = (
            functional.silu(inner)
            if self.gate is None
            else functional.silu(self.gate(wide)) * inner
        )
        output: Tensor = self.up(inner)
        return output.to(x.dtype)


def gate_branch(decision: Decision, gate_BT: Tensor, *, scaled: bool, training: bool) -> Decision:
    """Put the gate of a trained bypass into a hard decision (FlexiDepth, HeRo).

    Args:
        scaled: what the chosen branch adds is scaled by its gate, at inference too.
        training: the gate carries the gradient.
    """
    if scaled:
        decision.scale_BT = branch_scale(gate_BT, decision.execute_BT)
    if training:
        decision.gate_BT = straight_through(gate_BT, decision.execute_BT)
    return decision


def branch_scale(gate_BT: Tensor, execute_BT: Tensor) -> Tensor:
    """Factor of the selected branch: the gate of an executed token, 1 - gate of a bypassed one.

    It carries the gate's gradient without sampling (FlexiDepth, HeRo).
    """
    return torch.where(execute_BT, gate_BT, 1.0 - gate_BT)
