"""Losses of a forward over the vocabulary, a chunk of tokens at a time.

Logits are as wide as the vocabulary, so they are never kept: each chunk's gradient with respect to
the hidden states is computed at once, and the language-model head, which is frozen, gets none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from methods.engine.decoder.families import decoder
from methods.engine.decoder.head import Head
from methods.engine.decoder.offload import materialised
from methods.engine.decoder.placement import device_of

CHUNK_TOKENS = 256
"""Tokens whose logits exist at a time: 0.13 GB in float32 at a vocabulary of 128k."""

LogitsLoss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(float32 logits [N, V], targets [N, ...]) -> (sum of losses, its gradient [N, V])."""


def hidden_states(model: PreTrainedModel, ids_BT: Tensor) -> Tensor:
    """Final hidden states [B, T, D], the input of the LM head."""
    states: Tensor = decoder(model)(input_ids=ids_BT, use_cache=False)[0]
    return states


def language_model_loss(model: PreTrainedModel, ids_BT: Tensor) -> Tensor:
    """Mean cross-entropy of each next token, nats, float32 scalar."""
    hidden = hidden_states(model, ids_BT)[:, :-1].flatten(0, 1)
    targets = ids_BT[:, 1:].flatten()
    return _head_loss(model, hidden, targets, _cross_entropy) / len(targets)


def distillation_loss(
    model: PreTrainedModel, ids_BT: Tensor, teacher_BTD: Tensor, positions: float = 1.0
) -> Tensor:
    """Mean KL(dense || routed) over next-token distributions, nats, float32 scalar.

    Args:
        teacher_BTD: the dense model's final hidden states on the same tokens, no gradient.
        positions: share of the tokens, drawn anew, over which the mean is taken.
    """
    hidden, teacher_ND = hidden_states(model, ids_BT).flatten(0, 1), teacher_BTD.flatten(0, 1)
    if positions < 1.0:
        some = torch.randperm(len(hidden))[: max(1, round(positions * len(hidden)))]
        some = some.to(hidden.device)
        hidden, teacher_ND = hidden[some], teacher_ND[some]
    head = Head(model)

    def divergence(logits: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        return _kl(logits, head(teacher))

    return _head_loss(model, hidden, teacher_ND, divergence) / len(hidden)


def _cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    log_p = functional.log_softmax(logits, dim=-1)
    picked = targets[:, None]
    loss = -log_p.gather(1, picked).sum()
    gradient = log_p.exp_()
    gradient.scatter_add_(1, picked, torch.full_like(picked, -1.0, dtype=gradient.dtype))
    return loss, gradient


def _kl(logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    log_q = functional.log_softmax(logits, dim=-1)
    log_p = functional.log_softmax(teacher_logits, dim=-1)
    p = log_p.exp()
    loss = torch.dot(p.flatten(), (log_p - log_q).flatten())
    return loss, log_q.exp_().sub_(p)


def _head_loss(
    model: PreTrainedModel, hidden_ND: Tensor, targets: Tensor, loss: LogitsLoss
) -> Tensor:
    """Sum of `loss` over the head's logits at `hidden_ND`, differentiable in `hidden_ND` only."""
    head = Head(model)
    place = device_of(head.module)
    with materialised(head.module):
        total: Tensor = _HeadLoss.apply(hidden_ND.to(place), targets.to(place), head, loss)
    return total


class _HeadLoss(torch.autograd.Function):
    """Loss through a frozen linear head: forward and gradient of a chunk in one visit."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, targets: Tensor, head: Head, loss: LogitsLoss
    ) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        total = torch.zeros((), device=hidden_ND.device)
        gradients = torch.empty_like(hidden_ND) if wanted else None
        weight = head.module.get_parameter("weight")
        for start in range(0, len(hidden_ND), CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            logits = head(hidden_ND[rows])
            value, gradient = loss(logits, targets[rows])
            total += value
            if gradients is not None:
                gradient = head.pulled_back(logits, gradient)
                gradients[rows] = gradient.to(weight.dtype) @ weight
        ctx.save_for_backward(gradients)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, None, None, None]:
        (gradients,) = ctx.saved_tensors
        scaled = None if gradients is None else gradients * upstream[0].to(gradients.dtype)
        return scaled, None, None, None
