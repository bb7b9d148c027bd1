"""FlexiDepth: later blocks that a token may leave for a narrow trained adapter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

from torch import nn

from methods.base import Budget, Site, Stage
from methods.options import Count, Ge, NonNegative, Sparsity, Start, Training, grouped
from methods.parts.narrow_ffn import NarrowFFN
from methods.parts.routers import BottleneckRouter, PerSite
from methods.parts.trained_bypass import TrainedBypass

TRAINING = Training(lr=1e-4, schedule="cosine", warmup=0.03, betas=(0.9, 0.95))


class FlexiDepth(TrainedBypass):
    """Adaptive depth with a trained bypass (Luo et al., arXiv 2503.23798, COLM 2025).

    The router reads the block's normalised input. A bypassed token writes its keys and values,
    skips attention and takes an adapter instead of the block. What the chosen branch adds is
    scaled by the gate (or by 1 - gate), at inference too; the published code scales the MLP's
    half of the block alone.

    Args:
        first_layer: routed from here on; -1 is the latter half.
        reduction: of the widths of router bottleneck (D / reduction) and adapter (MLP width /
            reduction).
        output: `scaled` as published; `whole` keeps the branch's value and lets the gate carry
            the gradient.
        start: `published`, or `closed_form`: adapters as forecasters of what the block adds,
            routers, which get a bias, as the regression of their error.
        train: `end_to_end` (routers and adapters, as published), `adapters` alone, on the decisions
            of its routers, or `none` for what it starts with.
        training: `Training`, of routers and adapters together; with `hold` 0 once for all targets,
            at a threshold of 0, as published, where the weight alone sets the depth.
        depth_weight: of the mean over tokens of the squared sum of gates.
    """

    paper = "arXiv 2503.23798"

    def __init__(
        self,
        *,
        sparsity: Sparsity,
        first_layer: Annotated[int, Ge(-1)] = -1,
        reduction: Count = 16,
        output: Literal["scaled", "whole"] = "scaled",
        start: Start = "published",
        train: Literal["none", "adapters", "end_to_end"] = "end_to_end",
        training: Training = TRAINING,
        depth_weight: NonNegative = 1e-3,
    ) -> None:
        super().__init__(
            sparsity=sparsity,
            routers=PerSite(
                lambda shape: _router(shape.width, shape.width // reduction, start == "closed_form")
            ),
            adapters=PerSite(
                lambda shape: NarrowFFN(
                    width=shape.width, hidden=shape.mlp_width // reduction, kind="swiglu"
                )
            ),
            output=output,
            start=start,
            depth_weight=depth_weight,
            training=grouped(training, TRAINING),
        )
        self.first_layer, self.train_what = first_layer, train

    def sites(self) -> Sequence[Site]:
        assert self.shape is not None, "setup() comes first"
        layers = self.shape.layers
        first = layers // 2 if self.first_layer < 0 else self.first_layer
        return [Site(layer, "block") for layer in range(first, layers)]

    def stages(self, budget: Budget) -> Iterable[Stage]:
        if self.start_what == "closed_form":
            yield from self.closed_form_stages(budget)
        if self.train_what == "adapters":
            yield self.adapter_stage(budget)
        elif self.train_what == "end_to_end":
            parts, aims = [self.routers, self.adapters], self.training_options.hold > 0
            yield self.train_stage("train", parts, budget.routers, per_target=aims)


def _router(width: int, hidden: int, bias: bool) -> BottleneckRouter:
    """Linear(D, r) -> RMSNorm -> Tanh -> Linear(r, D) -> Linear(D, 1), published without biases."""
    head = nn.Sequential(nn.Linear(hidden, width, bias=False), nn.Linear(width, 1, bias=bias))
    return BottleneckRouter(width=width, hidden=hidden, activation=nn.Tanh(), head=head, bias=False)
