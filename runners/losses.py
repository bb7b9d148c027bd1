"""Training objectives on a causal LM, computed without holding a [B, T, V] tensor of logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from methods.engine.adapter import decoder

CHUNK_TOKENS = 512


def hidden_states(model: nn.Module, ids_BT: Tensor) -> Tensor:
    """Final hidden states [B, T, D], the input of the LM head."""
    return decoder(model)(input_ids=ids_BT, use_cache=False)[0]


def language_model_loss(model: nn.Module, ids_BT: Tensor) -> Tensor:
    """Mean cross-entropy of each next token, nats, float32 scalar."""
    hidden = hidden_states(model, ids_BT)[:, :-1].flatten(0, 1)
    targets = ids_BT[:, 1:].flatten()
    head = model.get_output_embeddings()

    def chunk_loss(h: Tensor, t: Tensor) -> Tensor:
        return functional.cross_entropy(head(h).float(), t, reduction="sum")

    return _sum_over_chunks(chunk_loss, hidden, targets) / len(targets)


def distillation_loss(model: nn.Module, ids_BT: Tensor, teacher_BTD: Tensor) -> Tensor:
    """Mean KL(dense || routed) over next-token distributions, nats, float32 scalar.

    Args:
        teacher_BTD: the dense model's final hidden states on the same tokens, no gradient.
    """
    hidden = hidden_states(model, ids_BT).flatten(0, 1)
    head = model.get_output_embeddings()

    def chunk_loss(h: Tensor, t: Tensor) -> Tensor:
        with torch.no_grad():
            target = functional.log_softmax(head(t).float(), dim=-1)
        return functional.kl_div(
            functional.log_softmax(head(h).float(), dim=-1),
            target,
            reduction="sum",
            log_target=True,
        )

    return _sum_over_chunks(chunk_loss, hidden, teacher_BTD.flatten(0, 1)) / len(hidden)


def _sum_over_chunks(loss: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    """Sum of loss(a[i:j], b[i:j]); the logits are recomputed in backward, never kept."""
    total = torch.zeros((), device=a.device)
    for start in range(0, len(a), CHUNK_TOKENS):
        end = start + CHUNK_TOKENS
        if torch.is_grad_enabled() and a.requires_grad:
            part = checkpoint(loss, a[start:end], b[start:end], use_reentrant=False)
        else:
            part = loss(a[start:end], b[start:end])
        total = total + part
    return total
