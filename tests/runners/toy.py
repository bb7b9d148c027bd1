"""A method small enough to compute by hand, and what a test needs to train it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from methods.base import Decision, Method, RouteContext, Shape, Site, StageBudget
from methods.engine.routed import attach
from runners.corpus.rows import ProbeText
from runners.training.loop import Loop
from runners.training.probe import ModelProbe
from tests.conftest import token_rows

SITES = (Site(1, "mlp"), Site(2, "mlp"))


class Toy(Method):
    """A linear router on two MLPs; a bypassed token gets a learned vector."""

    reserve = 0

    def setup(self, shape: Shape) -> None:
        super().setup(shape)
        generator = torch.Generator().manual_seed(7)
        start = lambda: nn.Parameter(torch.randn(shape.width, generator=generator) * 0.1)  # noqa: E731
        self.weights = nn.ParameterDict({site.key: start() for site in SITES})
        self.vectors = nn.ParameterDict({site.key: start() for site in SITES})

    def sites(self) -> Sequence[Site]:
        return SITES

    def route(self, site: Site, x_BTD: Tensor, ctx: RouteContext) -> Decision:
        scores = x_BTD.float() @ self.weights[site.key]
        decision = self.decide(scores)
        if ctx.training:
            soft = torch.sigmoid(scores)
            decision.gate_BT = decision.gate_BT + soft - soft.detach()
        return decision

    def approximate(self, site: Site, x_BTD: Tensor) -> Tensor:
        return self.vectors[site.key].expand_as(x_BTD)


class Bare(Toy):
    """Breaks the contract: scores instead of a decision."""

    def route(self, site: Site, x_BTD: Tensor, ctx: RouteContext) -> Any:
        return x_BTD.float() @ self.weights[site.key]


def toy(model: PreTrainedModel, *, sparsity: float = 0.1) -> Toy:
    """Attached to the model."""
    method = Toy(sparsity=sparsity)
    attach(model, method)
    return method


def toy_probe(model: PreTrainedModel, method: Method, **options: Any) -> ModelProbe:
    """Random rows for every question, all of 16 tokens."""
    train, calibration = token_rows(12, 16, seed=1), token_rows(10, 16, seed=2)
    text = ProbeText(train=train, calibration=calibration, sensitivity=train[:4])
    return ModelProbe(model, method, text, **options)


def toy_loop(
    model: PreTrainedModel,
    method: Method,
    *,
    objective: Any = "lm",
    seed: int = 0,
    rows: Tensor | None = None,
    on_step: Callable[[str, dict[str, float]], None] = lambda stage, figures: None,
) -> Loop:
    """A loop on random rows, or on `rows`."""

    def text(budget: StageBudget) -> Tensor:
        return token_rows(8, budget.seq_len, seed=5) if rows is None else rows

    probe = toy_probe(model, method)
    return Loop(model, method, probe, text, objective=objective, seed=seed, on_step=on_step)
