"""GateSkip: a gate scales what each branch adds, and tokens of low gates skip the branch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from methods.base import Budget, Decision, Probe, RouteContext, RoutedView, Site, Stage
from methods.options import Gt, Le, LoraSpec, NonNegative, Positive, Sparsity, Training
from methods.parts.gates import top_share
from methods.parts.routed_method import RoutedMethod
from methods.parts.routers import PerSite, Router

BIAS = 5.0
"""Of a gate at the start: sigmoid(5) = 0.993, so that the pretrained model is nearly as it was."""
KNOTS = 256
"""Of a unit's quantiles."""
PASSES = 3
"""Over calibration text, to find quantiles that the routed model has with them."""
NOBODY = -1e9
"""A threshold at which no token skips, and gates still scale."""


class GateSkip(RoutedMethod):
    """Sigmoid gates at the exit of each branch, skipped where low ("What Layers When: Learning to
    Skip Compute in LLMs with Residual Gates", arXiv 2510.13876, ICLR 2026).

    g = sigmoid(W x + b) scales what a unit adds to the residual stream; of each unit, the tokens of
    the lowest mean gate skip it. In training those are a share of the sequence that rises to the
    target, and the gradient passes through executed tokens only. At inference the published share
    is a quantile over the tokens of the batch: it looks ahead, and is undefined for one decoded
    token. Here a gate is ranked in its unit's distribution over calibration text, and one threshold
    for all units decides on that rank, from the token alone.

    There is no closed-form start: every unit skips the same share, and gates that order tokens by
    what a skip misses skip the same tokens in all of them (10.7 nats at 0.25 before training;
    8.5 from the published start, 9.7 at random).

    Args:
        gate: `scalar`, one number a token, or the paper's `vector` of D, whose D x D matrix costs
            as much as the projections of a narrow model's attention.
        train: gates and adapters `end_to_end`, or `none`.
        train_lr: of both, cosine.
        ramp: share of the stage over which the skipped share rises linearly to the target; 1 is
            published, less trains the rest of the stage at the target.
        gate_weight: of the mean gate, its root mean square over D (paper: 0.1 of its norm).
        lora: adapters in place of the paper's training of the whole model, or None.
    """

    paper = "arXiv 2510.13876"

    def __init__(
        self,
        *,
        sparsity: Sparsity,
        gate: Literal["scalar", "vector"] = "scalar",
        train: Literal["none", "end_to_end"] = "end_to_end",
        train_lr: Positive = 2e-4,
        ramp: Annotated[float, Gt(0.0), Le(1.0)] = 1.0,
        gate_weight: NonNegative = 0.1,
        lora: LoraSpec | None = None,
    ) -> None:
        gates = PerSite[Gate](
            lambda shape: Gate(width=shape.width, channels=shape.width if gate == "vector" else 1)
        )
        training = Training(lr=train_lr, schedule="cosine")
        super().__init__(sparsity=sparsity, routers=gates, training=training, lora=lora)
        self.train_what = train
        self.ramp, self.gate_weight = ramp, gate_weight
        self.seen: dict[Site, list[Tensor]] | None = None
        """Scores of valid tokens, while the quantiles are measured."""

    def route(self, site: Site, x_BTD: Tensor, ctx: RouteContext) -> Decision:
        logits = self.routers(site, x_BTD)
        scores_BT, scale_BTC = mean_gate(logits), torch.sigmoid(logits)
        scale = scale_BTC[..., 0] if scale_BTC.shape[-1] == 1 else scale_BTC
        if ctx.training:
            target = self.sparsity if ctx.target is None else ctx.target
            kept = 1.0 - min(1.0, ctx.anneal / self.ramp) * target
            execute_BT = top_share(scores_BT.detach(), ctx.valid_BT, kept)
            return Decision(execute_BT, execute_BT.float(), scores_BT, scale_BT=scale)
        if self.seen is not None:
            self.seen.setdefault(site, []).append(scores_BT[ctx.valid_BT])
        decision = self.decide(self.routers.at(site).rank(scores_BT))
        dense = self.threshold.isneginf()  # sparsity 0 is the model as it was, gates left out
        decision.scale_BT = torch.where(dense, torch.ones_like(scale), scale)
        return decision

    def stages(self, budget: Budget) -> Iterable[Stage]:
        if self.train_what == "end_to_end":
            yield self.train_stage("train", [self.routers], budget.routers, lora=self.lora)

    def start(self, probe: Probe, sparsity: float) -> None:
        """Leave the threshold: in training a share of each sequence executes."""
        self.threshold.zero_()

    def calibrate(self, probe: Probe, sparsity: float) -> float | None:
        """Measure each unit's quantiles in the routed model, then the threshold of all."""
        for threshold in [NOBODY] + [sparsity] * (PASSES - 1):
            self.seen = {}
            probe.routed_scores(threshold)
            for site, scores in self.seen.items():
                self.routers.at(site).set_quantiles(torch.cat(scores))
            self.seen = None
        return super().calibrate(probe, sparsity)

    def _routed_loss(self, view: RoutedView) -> Tensor:
        """Task loss + weight * mean over units and tokens of the gate."""
        assert view.valid_BT is not None
        gates = [rms(d.scale_BT) for d in view.decisions.values() if d.scale_BT is not None]
        mean = torch.stack([gate_BT[view.valid_BT].mean() for gate_BT in gates]).mean()
        return view.task_loss + self.gate_weight * mean


class Gate(Router):
    """Linear gate of a unit's output, and the unit's distribution of mean gates.

    Args:
        width: D.
        channels: gates of a token, 1 or D.
    """

    quantiles_K: Tensor

    def __init__(self, *, width: int, channels: int) -> None:
        super().__init__(width=width, outputs=channels)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.constant_(self.head.bias, BIAS)
        self.register_buffer("quantiles_K", torch.linspace(0.0, 1.0, KNOTS + 1))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the gates, float32: [..., D] -> [..., channels]."""
        logits: Tensor = self.head(x.float())
        return logits

    def set_quantiles(self, scores_N: Tensor) -> None:
        """Take the distribution of these scores."""
        places = torch.linspace(0.0, 1.0, KNOTS + 1, device=scores_N.device)
        self.quantiles_K.copy_(torch.quantile(scores_N, places))

    def rank(self, scores_BT: Tensor) -> Tensor:
        """Share of that distribution below each score, linear between quantiles, and beyond."""
        quantiles = self.quantiles_K
        above = torch.searchsorted(quantiles, scores_BT.contiguous(), right=True).clamp(1, KNOTS)
        low, high = quantiles[above - 1], quantiles[above]
        within = (scores_BT - low) / (high - low).clamp_min(1e-12)
        return (above - 1 + within) / KNOTS


def mean_gate(logits_BTC: Tensor) -> Tensor:
    """Score a token by its mean gate: -log(1 - mean gate), [B, T].

    In the order of the mean; a gate near 1 has few digits left, its distance from 1 has all.
    """
    away = functional.logsigmoid(-logits_BTC).logsumexp(-1)
    return math.log(logits_BTC.shape[-1]) - away


def rms(scale: Tensor) -> Tensor:
    """Root mean square gate of each token, [B, T]."""
    return scale if scale.dim() == 2 else scale.square().mean(-1).sqrt()
