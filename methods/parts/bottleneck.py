"""Routers with a normalised bottleneck: D-LLM's and FlexiDepth's."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class BottleneckRouter(nn.Module):
    """Linear(D, r) -> RMSNorm -> activation -> head; float32 score, execute where high.

    Args:
        width: D of the model.
        hidden: r.
        activation: after the norm.
        head: from r to one score, or to the logits (bypass, execute), whose difference is it.
        bias: of the first layer.
    """

    def __init__(
        self, *, width: int, hidden: int, activation: nn.Module, head: nn.Module, bias: bool
    ) -> None:
        super().__init__()
        if hidden < 1:
            raise ValueError(f"a router needs a hidden width of at least 1, not {hidden}")
        self.down = nn.Linear(width, hidden, bias=bias)
        self.norm = nn.RMSNorm(hidden, eps=1e-5)
        self.activation, self.head = activation, head

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [...]."""
        logits = self.head(self.activation(self.norm(self.down(x.float()))))
        return logits[..., 1] - logits[..., 0] if logits.shape[-1] == 2 else logits[..., 0]


def biased_head(hidden: int, bias: tuple[float, float]) -> nn.Linear:
    """Linear(r, 2) that starts with these (bypass, execute) biases."""
    head = nn.Linear(hidden, 2)
    with torch.no_grad():
        head.bias.copy_(torch.tensor(bias))
    return head
