"""Runs a recipe on a tiny random model of as many layers, to see how often it reads its text.

How many passes a fit or a calibration makes is up to the method's code; here that code runs, on a
model a thousandth as large, behind a probe that counts what it would have read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from methods.base import (
    Budget,
    Method,
    RoutedScores,
    Shape,
    Site,
    Stage,
    StageBudget,
    SwiGLU,
    UnitView,
)
from runners.base_model.embedded import random_model
from runners.base_model.load import build_method
from runners.point import recipe
from runners.training.loop import Loop
from runners.training.probe import ModelProbe, ProbeText

ROWS, TOKENS = 4, 32
"""Of the stand-in for each text."""
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "initializer_range": 0.1,
    "tie_word_embeddings": True,
}


@dataclass
class Reading:
    """Tokens that one stage would have passed through the real model."""

    dense: float = 0.0
    routed: float = 0.0
    backward: float = 0.0
    """With a backward pass to the inputs, beside the forward."""
    visited: float = 0.0
    """Whose inputs and outputs of every unit were looked at."""


@dataclass
class Rehearsed:
    """One stage and what it read."""

    stage: Stage
    reading: Reading


class CountingProbe:
    """Implements `methods.base.Probe`: counts at the real sizes, answers from the tiny model."""

    def __init__(
        self, inner: ModelProbe, budget: Budget, share: float = 1.0, known: list[Site] | None = None
    ) -> None:
        self.inner, self.budget, self.share = inner, budget, share
        self.shape: Shape = inner.shape
        self.reading = Reading()
        self._measured = [] if known is None else known

    def sample(self, share: float = 0.25) -> CountingProbe:
        part = CountingProbe(
            self.inner.sample(share), self.budget, self.share * share, self._measured
        )
        part.reading = self.reading
        return part

    def stream(self, visit: Callable[[UnitView], None], split: str = "train") -> None:
        tokens = self._train if split == "train" else self._calibration
        self.reading.dense += tokens
        self.reading.visited += tokens
        self.inner.stream(visit, split)

    def stream_routed(self, visit: Callable[[UnitView], None]) -> None:
        self.reading.routed += self._train
        self.reading.visited += self._train
        self.inner.stream_routed(visit)

    def loss(self, bypassed: Collection[Site], tokens: int | None = None) -> float:
        self.reading.dense += self._calibration if tokens is None else min(tokens, self._train)
        return self.inner.loss(bypassed, tokens)

    def sensitivity(self) -> dict[Site, float]:
        if not self._measured:
            self.reading.backward += self.budget.sensitivity_tokens
            self._measured.extend(self.shape.units())
        return self.inner.sensitivity()

    def swiglu(self, site: Site) -> SwiGLU:
        return self.inner.swiglu(site)

    def routed_scores(self, threshold: float) -> RoutedScores:
        self.reading.routed += self._calibration
        return self.inner.routed_scores(threshold)

    def routed_loss(self) -> float:
        self.reading.routed += self._calibration
        return self.inner.routed_loss()

    @property
    def _train(self) -> float:
        return self.share * self.budget.fit_tokens

    @property
    def _calibration(self) -> float:
        return self.share * self.budget.calibration_tokens


@dataclass
class Rehearsal:
    """The recipe of a config on a stand-in for its model.

    Args:
        config: resolved.
        family: of the model.
        layers: as many as it has.
        budget: the real one; gradient stages run one step of it on a short row.
    """

    config: Mapping[str, Any]
    family: str
    layers: int
    budget: Budget
    method: Method = field(init=False)

    def run(self) -> list[Rehearsed]:
        """Every stage in order, with what it read."""
        sizes = {**SIZES, "num_hidden_layers": self.layers}
        model, _ = random_model(family=self.family, sizes=sizes, seed=0)
        model = model.requires_grad_(False)
        self.method = build_method(self.config, model)
        inner = ModelProbe(model, self.method, _text())
        probe = CountingProbe(inner, self.budget)
        loop = Loop(
            model,
            self.method,
            probe,
            lambda _: _rows(0),
            objective=self.config["objective"],
            seed=0,
        )
        done = []
        for stage in recipe(self.method, self.budget):
            probe.reading = Reading()
            short = StageBudget(steps=1, batch_size=1, seq_len=TOKENS)
            loop.run(stage if stage.loss is None else replace(stage, budget=short))
            done.append(Rehearsed(stage, probe.reading))
        return done


def _text() -> ProbeText:
    return ProbeText(train=_rows(1), calibration=_rows(2), sensitivity=_rows(3)[:1])


def _rows(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 250, (ROWS, TOKENS), generator=generator)
