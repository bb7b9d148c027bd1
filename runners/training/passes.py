"""Forward passes of a gradient stage, and what its loss sees of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from methods.base import Method, RoutedView, Site, Stage, UnitView
from methods.engine.decoder.adapter import decoder
from methods.engine.observe import observed
from methods.engine.routed import Routing, routed, routing_of
from runners.runtime.distributed import local_rows
from runners.training.losses import distillation_loss, hidden_states, language_model_loss
from runners.training.micro_batches import Rates, parts_of

Objective = Literal["lm", "distill"]


class Passes:
    """Losses of a method on a model.

    Args:
        model: untouched and frozen.
        method: attached to the model.
        objective: `lm` cross-entropy, or `distill`, the KL to the dense model's distributions.
    """

    def __init__(self, model: PreTrainedModel, method: Method, objective: Objective) -> None:
        self.model, self.method, self.objective = model, method, objective

    def losses(
        self, stage: Stage, batch: Tensor, rows: int, progress_share: float, target: float
    ) -> Iterator[tuple[Tensor, Tensor, float]]:
        """(loss, execute rate, share of the micro-batch) of each part of at most `rows` rows.

        The rate is 1 under the dense forward. Losses are to be used before the next is asked for.
        """
        own = local_rows(len(batch))
        if rows >= len(batch):
            yield *self._loss(stage, batch, progress_share, target), 1.0
            return
        parts, whole = parts_of(batch, rows, own), None
        soft = stage.forward == "routed" and not stage.hard
        if soft and len(parts) > 1:
            views = []
            for part in parts:
                with torch.no_grad(), part.drawing():
                    views.append(self._view(stage, part.ids_BT, progress_share, target))
            whole = Rates.mean([part.share for part in parts], views)
        for part in parts:
            alone = part.share if soft and whole is None else None
            with part.drawing():
                loss, rate = self._loss(stage, part.ids_BT, progress_share, target, whole, alone)
            yield loss, rate, part.share

    def _loss(
        self,
        stage: Stage,
        batch: Tensor,
        progress_share: float,
        target: float,
        whole: Rates | None = None,
        share: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Loss of one pass and its mean execute rate.

        Args:
            whole: rates of the micro-batch that this is a part of.
            share: of the micro-batch, for the only part of this process; `whole` is then added up
                over processes.
        """
        if stage.forward == "dense":
            return self._dense_loss(stage, batch), torch.ones((), device=batch.device)
        view = self._view(stage, batch, progress_share, target)
        if share is not None:
            whole = Rates.mean([share], [view])
        if whole is not None:
            view = whole.seen_by(view)
        return stage.loss(view), view.execute_rate.detach()  # type: ignore[misc, arg-type]

    def _view(
        self, stage: Stage, batch: Tensor, progress_share: float, target: float
    ) -> RoutedView:
        """What a loss sees of a routed pass."""
        teacher = None
        if self.objective == "distill":
            with torch.no_grad():
                teacher = hidden_states(self.model, batch)
        with routed(self.model, self.method, "gathered" if stage.hard else "masked"):
            routing = routing_of(self.model)
            routing.training = not stage.hard
            routing.anneal, routing.target = progress_share, target
            if teacher is None:
                task = language_model_loss(self.model, batch)
            else:
                task = distillation_loss(self.model, batch, teacher)
            return (counted_view if stage.hard else routed_view)(routing, task, target)

    def _dense_loss(self, stage: Stage, batch: Tensor) -> Tensor:
        """Sum over units; the model runs without gradient, the loss of each unit with it."""
        total = torch.zeros((), device=batch.device)

        def visit(view: UnitView) -> None:
            nonlocal total
            with torch.enable_grad():
                total = total + stage.loss(view)  # type: ignore[misc, arg-type]

        with torch.no_grad(), observed(self.model, visit):
            decoder(self.model)(input_ids=batch, use_cache=False)
        return total


def routed_view(routing: Routing, task_loss: Tensor, target: float) -> RoutedView:
    """Rates and side losses of the forward that just ran in training mode."""
    valid = routing.state.valid_BT
    assert valid is not None
    units = len(routing.counters.shape.units())
    rates: dict[Site, Tensor] = {}
    dropped = sum(len(site.units) for site in routing.counters.dropped)
    bypassed = torch.full((), float(dropped), device=task_loss.device)
    auxiliary = []
    for site, decision in routing.decisions.items():
        rate = (decision.gate_BT * valid).sum() / valid.sum()
        rates[site] = rate
        bypassed = bypassed + (1.0 - rate) * len(site.units)
        if decision.auxiliary is not None:
            auxiliary.append(decision.auxiliary)
    side = torch.stack(auxiliary).mean() if auxiliary else torch.zeros_like(bypassed)
    return RoutedView(
        task_loss,
        1.0 - bypassed / units,
        rates,
        side,
        target,
        decisions=dict(routing.decisions),
        valid_BT=valid,
        anneal=routing.anneal,
    )


def counted_view(routing: Routing, task_loss: Tensor, target: float) -> RoutedView:
    """The same without gradient, for the forward of a `hard` stage: counts over valid tokens."""
    usage = routing.counters.read()
    rates = {
        site: torch.tensor(done / usage.tokens, device=task_loss.device)
        for site, done in usage.decided.items()
    }
    rate = torch.tensor(1.0 - usage.sparsity(), device=task_loss.device)
    return RoutedView(task_loss, rate, rates, torch.zeros_like(rate), target)
