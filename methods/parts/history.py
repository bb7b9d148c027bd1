"""What a router may remember of a token's way through the layers (HeRo)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

PATH_FEATURES = 6


@dataclass
class Path:
    """State over depth of the tokens of one forward; read before it is written at each layer."""

    residual_BTD: Tensor
    """Residual stream at the last routed layer."""
    step_BTD: Tensor | None
    """Its change between the last two routed layers."""
    score_BT: Tensor
    """History score of the last layer."""
    product_BT: Tensor
    """Running product of the history scores."""
    memory_BTKV: Tensor
    """Linear attention: sum of decayed outer products of keys and values."""
    mass_BTK: Tensor
    """Sum of decayed keys."""


class HistoryEncoder(nn.Module):
    """Encodes a token's state and path, and keeps a linear-attention memory over depth.

    Shared by all layers, but for one forgetting factor each. Feature map ELU + 1 (Katharopoulos
    et al., arXiv 2006.16236).

    Args:
        width: D of the model.
        layers: of the model.
        state: size of the state encoding (published 48).
        path: size of the path encoding (published 16); state + path is the memory's width.
    """

    def __init__(self, *, width: int, layers: int, state: int = 48, path: int = 16) -> None:
        super().__init__()
        memory = state + path
        self.layers = layers
        self.state = nn.Linear(width, state)
        self.path = nn.Linear(PATH_FEATURES, path)
        self.query, self.key, self.value = (nn.Linear(memory, memory, bias=False) for _ in range(3))
        self.forget = nn.Parameter(torch.full((layers,), 2.0))
        self.head = nn.Linear(2 * memory + 1, 1)

    def forward(self, depth: int, h_BTD: Tensor, past: Path | None) -> tuple[Tensor, Path]:
        """History logit [B, T] of a routed layer, and the path after it.

        Args:
            depth: of the layer, from 0.
            h_BTD: residual stream that the decision reads.
            past: path up to the routed layer before, None at the first.
        """
        h = h_BTD.float()
        step = None if past is None else h - past.residual_BTD
        encoded = torch.cat(
            [functional.silu(self.state(unit_rms(h))), self._encode_path(depth, h, step, past)], -1
        )
        query = functional.elu(self.query(encoded)) + 1
        key = functional.elu(self.key(encoded)) + 1
        value = self.value(encoded)
        context = torch.zeros_like(value) if past is None else read(past, query)
        novelty = 1 - functional.cosine_similarity(encoded, context, dim=-1)
        logit = self.head(torch.cat([encoded, context, novelty[..., None]], -1))[..., 0]
        score, keep = torch.sigmoid(logit), torch.sigmoid(self.forget[depth])
        written = key[..., :, None] * value[..., None, :]
        return logit, Path(
            residual_BTD=h,
            step_BTD=step,
            score_BT=score,
            product_BT=score if past is None else past.product_BT * score,
            memory_BTKV=written if past is None else keep * past.memory_BTKV + written,
            mass_BTK=key if past is None else keep * past.mass_BTK + key,
        )

    def _encode_path(self, depth: int, h: Tensor, step: Tensor | None, past: Path | None) -> Tensor:
        """[B, T, path] from the six path features."""
        progress = (depth + 1) / self.layers
        zero, one = torch.zeros_like(h[..., 0]), torch.ones_like(h[..., 0])
        turn = zero
        if step is not None and past is not None and past.step_BTD is not None:
            turn = functional.cosine_similarity(step, past.step_BTD, dim=-1)
        size = zero if step is None else step.norm(dim=-1) / h.norm(dim=-1).clamp_min(1e-6)
        last, product = (one, one) if past is None else (past.score_BT, past.product_BT)
        features = [progress * one, (1 - progress) * one, size, turn, last, product]
        return functional.silu(self.path(torch.stack(features, -1)))


def unit_rms(h: Tensor) -> Tensor:
    """[..., D] at root mean square 1."""
    return h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)


def read(past: Path, query_BTK: Tensor) -> Tensor:
    """Linear attention of the query over the layers that the token has passed, [B, T, V]."""
    total = torch.einsum("btk,btkv->btv", query_BTK, past.memory_BTKV)
    mass = (query_BTK * past.mass_BTK).sum(-1, keepdim=True)
    return total / mass.clamp_min(1e-6)
