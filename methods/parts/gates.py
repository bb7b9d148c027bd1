"""Differentiable hard gates, used in training only."""

from __future__ import annotations

import torch
from torch import Tensor


def straight_through(soft: Tensor, hard: Tensor) -> Tensor:
    """Value of `hard`, gradient of `soft` (Bengio et al., arXiv 1308.3432)."""
    return hard.to(soft.dtype) + (soft - soft.detach())


def gumbel_gate(scores: Tensor, *, tau: float) -> Tensor:
    """Hard binary Gumbel-softmax sample of the pair of logits (score, 0).

    The difference of two Gumbel variables is logistic, so one logistic draw is enough
    (Jang et al., arXiv 1611.01144; Maddison et al., arXiv 1611.00712, appendix B).

    Args:
        scores: float, any shape; execute logit minus bypass logit.
        tau: temperature of the soft gate that carries the gradient.
    """
    uniform = torch.rand_like(scores).clamp_(1e-6, 1 - 1e-6)
    noisy = scores + torch.logit(uniform)
    return straight_through(torch.sigmoid(noisy / tau), noisy > 0)


def sigmoid_gate(scores: Tensor, *, tau: float) -> Tensor:
    """Hard gate score > 0 with the gradient of sigmoid(score / tau); no sampling."""
    return straight_through(torch.sigmoid(scores / tau), scores > 0)


def anneal(start: float, end: float, progress: float) -> float:
    """Linear from `start` to `end` while progress goes from 0 to 1."""
    return start + (end - start) * min(max(progress, 0.0), 1.0)
