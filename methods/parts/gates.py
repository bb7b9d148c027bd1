"""Differentiable hard gates, used in training only: of a token's own score, or of a choice."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


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


def top_share(scores_BT: Tensor, valid_BT: Tensor, share: float) -> Tensor:
    """Bool mask of the highest `share` of each sequence's valid tokens (expert choice).

    The count is rounded to the nearest whole token; ties go to the earlier token.
    """
    ranked = scores_BT.masked_fill(~valid_BT, float("-inf"))
    order = ranked.argsort(dim=1, descending=True, stable=True)
    place = torch.empty_like(order)
    place.scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
    count = (valid_BT.sum(1, keepdim=True) * share).round()
    return (place < count) & valid_BT


def membership_loss(logits_BT: Tensor, chosen_BT: Tensor, valid_BT: Tensor) -> Tensor:
    """Binary cross-entropy of sigmoid(logit) to "was among the chosen", mean over valid tokens.

    The auxiliary loss of Raposo et al. (arXiv 2404.02258, section 3.5): it centres the score on
    the choice, so that at inference the token's own score decides.
    """
    return functional.binary_cross_entropy_with_logits(
        logits_BT[valid_BT], chosen_BT[valid_BT].float()
    )
