"""Forward passes of a gradient stage, and what its loss sees of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from methods.base import Decision, Method, RoutedView, Site, Stage, UnitView
from methods.engine.decoder.families import decoder
from methods.engine.observe import observed
from methods.engine.routed import routed
from methods.engine.routing import Routing, routing_of
from methods.parts.calibration import weighted_quantile
from runners.runtime.distributed import all_reduce, is_distributed, local_rows
from runners.training.losses import distillation_loss, hidden_states, language_model_loss
from runners.training.state import RandomState

Objective = Literal["lm", "distill"]


class Passes:
    """Losses of a method on a model; arguments as those of `loop.Loop`."""

    def __init__(self, model: PreTrainedModel, method: Method, objective: Objective) -> None:
        self.model, self.method, self.objective = model, method, objective
        self._scored: list[tuple[Tensor, float]] = []
        """Scores of the last step, valid tokens only, and the units that each decides for."""
        self._pairs = 0
        """(token, unit) pairs of the last step."""
        self._taught: list[tuple[Tensor, Tensor]] = []
        """Rows and the dense model's states of the last step of a stage with `share_text`."""

    def threshold_for(self, share: float) -> float | None:
        """Give the threshold that bypasses this share of all units by the last step's scores.

        None if nothing was scored, or the stage holds no target.
        """
        if not self._scored:
            return None
        home = self._scored[0][0].device
        scores = torch.cat([own.to(home) for own, _ in self._scored])
        weights = torch.cat([torch.full_like(own, units) for own, units in self._scored])
        return weighted_quantile(scores, weights.to(home), share * self._pairs)

    def micro_batches(
        self, stage: Stage, batches: Sequence[Tensor], rows: int, anneal: float, target: float
    ) -> Iterator[tuple[Tensor, Tensor, float]]:
        """(loss, execute rate, share of the step) of each pass of this process over a step.

        The rate is 1 under the dense forward. Losses are to be used before the next is asked for.

        Args:
            batches: of the step.
            rows: of a pass at most.
        """
        self._scored, self._pairs = [], 0
        parts = [part for b in batches for part in b[local_rows(len(b))].split(rows)]
        self._taught = [
            kept for kept in self._taught if any(torch.equal(kept[0], p) for p in parts)
        ]
        total = sum(map(len, batches))
        shares = [len(part) / total for part in parts]
        rates = None
        soft = stage.forward == "routed" and not stage.hard
        if soft and len(parts) > 1:
            # a penalty may bend in the execute rate: its gradient is that at the rate of the whole
            # step, which a forward of the same draws finds out first
            draws, views = RandomState.take(parts[0].device), []
            for part in parts:
                with torch.no_grad():
                    views.append(self._view(stage, part, anneal, target, rates=True))
                if not _reads_rates(stage, views[0]):
                    break
            draws.put(parts[0].device)
            rates = _step_rates(shares, views) if len(views) == len(parts) else None
        for part, share in zip(parts, shares, strict=True):
            if stage.forward == "dense":
                yield self._dense_loss(stage, part), torch.ones((), device=part.device), share
                continue
            view = self._view(stage, part, anneal, target)
            if soft and len(parts) == 1 and is_distributed():
                rates = _step_rates(shares, [view])
            if rates is not None:
                view = _with_rates(view, rates)
            yield stage.loss(view), view.execute_rate.detach(), share  # type: ignore[misc, arg-type]

    def _view(
        self, stage: Stage, batch: Tensor, anneal: float, target: float, *, rates: bool = False
    ) -> RoutedView:
        """What a loss sees of a routed pass.

        Args:
            rates: the task's loss is not asked for.
        """
        teacher = None
        if self.objective == "distill" and not rates:
            teacher = self._dense_states(stage, batch)
        with routed(self.model, self.method, "gathered" if stage.hard else "masked"):
            routing = routing_of(self.model)
            routing.training = not stage.hard
            routing.anneal, routing.target = anneal, target
            if stage.hold and not rates:
                routing.observer = self._keep_scores
                self._pairs += batch.numel() * len(routing.counters.shape.units())
            if rates:
                task = hidden_states(self.model, batch).new_zeros(())
            elif teacher is None:
                task = language_model_loss(self.model, batch)
            else:
                task = distillation_loss(self.model, batch, teacher, stage.positions)
            return (counted_view if stage.hard else routed_view)(routing, task, target)

    @torch.no_grad()
    def _dense_states(self, stage: Stage, batch: Tensor) -> Tensor:
        """Final hidden states of the dense model; kept while a step reads the same rows."""
        for rows, states in self._taught:
            if torch.equal(rows, batch):
                return states
        states = hidden_states(self.model, batch)
        if stage.share_text:
            self._taught.append((batch, states))
        return states

    def _keep_scores(self, site: Site, decision: Decision, valid_BT: Tensor) -> None:
        scores = decision.scores_BT.detach()[valid_BT].float()
        self._scored.append((scores, float(len(site.units))))

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
    valid = routing.call.valid_BT
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


def _reads_rates(stage: Stage, view: RoutedView) -> bool:
    """Whether a stage's loss depends on execute rates, seen on a view without gradient."""
    mark = torch.zeros((), device=view.execute_rate.device, requires_grad=True)
    sites = {site: rate + mark for site, rate in view.site_rates.items()}
    marked = replace(view, execute_rate=view.execute_rate + mark, site_rates=sites)
    with torch.enable_grad():
        return stage.loss(marked).requires_grad  # type: ignore[misc, arg-type]


Rates = dict[Site | None, Tensor]
"""Execute rates of a step without gradient, by site; the model's under None."""


def _step_rates(shares: Sequence[float], views: Sequence[RoutedView]) -> Rates:
    """Rates over the passes of a step, those of other processes included."""
    own = [{None: view.execute_rate, **dict[Any, Tensor](view.site_rates)} for view in views]
    rates: Rates = {
        key: torch.stack([s * r[key] for s, r in zip(shares, own, strict=True)]).sum(0).detach()
        for key in own[0]
    }
    all_reduce(list(rates.values()))
    return rates


def _with_rates(view: RoutedView, rates: Rates) -> RoutedView:
    """A pass's view with the step's rates as values and its own as what carries gradient.

    With f the loss and w the passes' shares, the sum of w * gradient f(step's rates) over the
    passes is the gradient of f at the step's rates, because these are the w-weighted sum.
    """

    def pin(whole: Tensor, own: Tensor) -> Tensor:
        return whole + (own - own.detach())

    sites = {site: pin(rates[site], own) for site, own in view.site_rates.items()}
    return replace(view, execute_rate=pin(rates[None], view.execute_rate), site_rates=sites)
