"""Methods that train what a bypassed token takes, chosen by a gate (FlexiDepth, HeRo,
DiffSkip)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from methods.base import (
    Budget,
    Decision,
    Method,
    Probe,
    RouteContext,
    RoutedView,
    Shape,
    Site,
    Stage,
)
from methods.options import Sparsity, Start, Training
from methods.parts.gates import straight_through
from methods.parts.narrow_ffn import NarrowFFN, fit_linear
from methods.parts.penalties import depth_penalty
from methods.parts.routed_method import DAMPING, RoutedMethod
from methods.parts.routers import PerSite


class TrainedBypass(RoutedMethod):
    """Executes a unit or takes an adapter; gate = sigmoid(score - threshold).

    What the chosen branch adds is scaled by the gate, or by 1 - gate, at inference too, which
    carries the gradient without sampling. A threshold of minus infinity is the dense model.

    Args:
        adapters: of each site.
        output: `scaled` as published; `whole` keeps the branch's value and lets the gate carry
            the gradient.
        start: `published` leaves routers and adapters at random; `closed_form` makes each adapter
            the forecaster of its width, and each router the regression of that forecaster's error.
        depth_weight: of the mean over tokens of the squared sum of gates.
        training: of the gradient stage.
    """

    def __init__(
        self,
        *,
        sparsity: Sparsity,
        routers: PerSite,
        adapters: PerSite[NarrowFFN],
        output: Literal["scaled", "whole"],
        start: Start,
        depth_weight: float,
        training: Training,
    ) -> None:
        super().__init__(sparsity=sparsity, routers=routers, training=training)
        self.adapters, self.output = adapters, output
        self.start_what, self.depth_weight = start, depth_weight

    @property
    def bypasses(self) -> PerSite[NarrowFFN]:
        return self.adapters

    def route(self, site: Site, x_BTD: Tensor, ctx: RouteContext) -> Decision:
        decision = self.decide(self.score(site, x_BTD, ctx))
        gate_BT, execute_BT = self._gate(decision), decision.execute_BT
        if self.output == "scaled":
            decision.scale_BT = torch.where(execute_BT, gate_BT, 1.0 - gate_BT)
        if ctx.training:
            decision.gate_BT = straight_through(gate_BT, execute_BT)
        return decision

    def closed_form_stages(self, budget: Budget, scale: float = 1.0) -> Iterable[Stage]:
        def fit(probe: Probe) -> None:
            fit_linear(probe, self.adapters, DAMPING)

        yield Stage("adapters", fit=fit)
        yield from super().closed_form_stages(budget, scale)

    def adapter_stage(self, budget: Budget) -> Stage:
        """The gradient stage of the adapters alone, on hard decisions, as informed routing's."""
        parts, how = [self.adapters], {"hard": True, "per_target": True}
        return self.train_stage("train_adapters", parts, budget.routers, **how)

    def _gate(self, decision: Decision) -> Tensor:
        return torch.sigmoid(decision.scores_BT - self.threshold)

    def _routed_loss(self, view: RoutedView) -> Tensor:
        if not view.decisions:  # hard ones: nothing that a penalty could move
            return view.task_loss
        assert view.valid_BT is not None
        gates = map(self._gate, view.decisions.values())
        return view.task_loss + depth_penalty(gates, view.valid_BT, weight=self.depth_weight)


class LaterMLPs(TrainedBypass):
    """MLPs of the later layers, each with an adapter in its place (HeRo, DiffSkip).

    Args:
        first_layer: routed from here on; -1 is the latter half, or from as early as leaves each
            routed MLP at most `share` of its tokens to bypass.
        share: see `first_layer`.
        options: of `TrainedBypass`.
    """

    def __init__(self, *, first_layer: int, share: float, **options: Any) -> None:
        super().__init__(**options)
        self.first_layer, self.share = first_layer, share

    def setup(self, shape: Shape) -> None:
        Method.setup(self, shape)
        for site in reversed(self.sites()):
            # From the last layer, so that a layer starts alike whatever the target adds before it.
            self.routers.create([site], shape)
            self.adapters.create([site], shape)

    def sites(self) -> Sequence[Site]:
        assert self.shape is not None, "setup() comes first"
        layers, first = self.shape.layers, self.first_layer
        if first < 0:
            needed = 2 * self.sparsity * layers / self.share
            first = max(0, min(layers // 2, int(layers - needed)))
        return [Site(layer, "mlp") for layer in range(first, layers)]

    def closed_form_stages(self, budget: Budget, scale: float = 1.0) -> Iterable[Stage]:
        for stage in super().closed_form_stages(budget, scale):
            yield replace(stage, per_target=True)  # the target says which layers are routed
