"""A Llama-like forward written out, in which a test replaces the layer by a paper's equation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from methods.base import Budget, Decision, RouteContext, Site, StageBudget
from methods.engine.routed import routed

LayerRule = Callable[[int, Any, Tensor, "ByHand"], Tensor]
ONE = StageBudget(1, 1, 8)
BUDGET = Budget("test", 8, 8, 8, ONE, ONE, ONE)


class ByHand:
    """Runs embeddings, `rule` for each layer, final norm and head.

    Args:
        model: small, of the Llama family.
        rule: (index, layer, residual stream [B, T, D], self) -> stream after the layer.
    """

    def __init__(self, model: Any, rule: LayerRule) -> None:
        self.model, self.rule = model, rule
        self.tokens, self.rotary = 0, None

    def __call__(self, ids_BT: Tensor) -> Tensor:
        """Logits [B, T, V]."""
        h = self.model.model.embed_tokens(ids_BT)
        self.tokens = ids_BT.shape[1]
        positions = torch.arange(self.tokens).expand(ids_BT.shape)
        self.rotary = self.model.model.rotary_emb(h, positions)
        for index, layer in enumerate(self.model.model.layers):
            h = self.rule(index, layer, h, self)
        logits: Tensor = self.model.lm_head(self.model.model.norm(h))
        return logits

    def attention(self, layer: Any, h: Tensor, seen_BT: Tensor | None = None) -> Tensor:
        """Attention output; with `seen_BT`, only those keys (and each query's own) are seen."""
        causal = torch.ones(self.tokens, self.tokens, dtype=torch.bool).tril()
        allowed = causal.expand(h.shape[0], 1, -1, -1)
        if seen_BT is not None:
            own = torch.eye(self.tokens, dtype=torch.bool)
            allowed = allowed & (seen_BT[:, None, None] | own)
        output: Tensor = layer.self_attn(
            hidden_states=layer.input_layernorm(h),
            attention_mask=allowed,
            position_embeddings=self.rotary,
        )[0]
        return output

    def mlp(self, layer: Any, h: Tensor) -> Tensor:
        """MLP output."""
        output: Tensor = layer.mlp(layer.post_attention_layernorm(h))
        return output

    def block(self, layer: Any, h: Tensor, seen_BT: Tensor | None = None) -> Tensor:
        """Stream after the whole layer."""
        middle = h + self.attention(layer, h, seen_BT)
        return middle + self.mlp(layer, middle)


def train_forward(
    model: Any, method: Any, ids_BT: Tensor, *, target: float | None = None, anneal: float = 0.0
) -> tuple[Tensor, dict[Site, Decision]]:
    """Logits and decisions of one forward in training mode; papers reserve no token."""
    method.reserve = 0
    with routed(model, method):
        routing = model.routing
        routing.training, routing.target, routing.anneal = True, target, anneal
        logits = model(input_ids=ids_BT).logits
        return logits, dict(routing.decisions)


def evaluate(model: Any, method: Any, ids_BT: Tensor) -> tuple[Tensor, dict[Site, Decision]]:
    """Logits and decisions of one forward as at inference; papers reserve no token."""
    method.reserve = 0
    seen: dict[Site, Decision] = {}
    with torch.no_grad(), routed(model, method):
        model.routing.observer = lambda site, decision, _: seen.__setitem__(site, decision)
        return model(input_ids=ids_BT).logits, seen


def context(residual_BTD: Tensor, *, training: bool, target: float | None = None) -> RouteContext:
    """A route context of rows without padding."""
    batch, tokens, _ = residual_BTD.shape
    positions = torch.arange(tokens).expand(batch, tokens)
    valid = torch.ones(batch, tokens, dtype=torch.bool)
    return RouteContext(residual_BTD, positions, valid, training, 0.0, target)


def cross_entropy(logits_BTV: Tensor, ids_BT: Tensor) -> Tensor:
    """Mean next-token loss."""
    return functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())
