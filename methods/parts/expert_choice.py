"""Expert choice: in training a unit picks its tokens, and a score learns to tell which."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


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
