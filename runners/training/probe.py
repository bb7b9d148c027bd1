"""A model and its text as the training-free fits and the calibration see them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from methods.base import Decision, Method, RoutedScores, Shape, Site, SwiGLU, UnitView
from methods.engine.decoder.families import decoder, layers_of, shape_of
from methods.engine.decoder.neurons import weights_of
from methods.engine.decoder.placement import input_device
from methods.engine.measure.flops import flops_ratio
from methods.engine.observe import bypassed, observed, unit_gradients
from methods.engine.routed import routed
from methods.engine.routing import routing_of
from runners.corpus.rows import ProbeText
from runners.errors import UserError
from runners.runtime.progress import note, progress
from runners.training.losses import language_model_loss


class ModelProbe:
    """Implements `methods.base.Probe` on a Hugging Face model.

    Args:
        model: untouched; routed only inside calls.
        method: the one that is being fitted.
        text: what each kind of question reads.
        batch_tokens: tokens per forward call.
    """

    def __init__(
        self, model: PreTrainedModel, method: Method, text: ProbeText, *, batch_tokens: int = 2048
    ) -> None:
        self.model, self.method, self.text = model, method, text
        self.batch_tokens = batch_tokens
        self.shape: Shape = shape_of(model.config)
        self._read, self._is_sample = [0], False
        self._sensitivity: dict[Site, float] | None = None

    @property
    def row(self) -> int:
        """Tokens of a row of its text."""
        return self.text.train.shape[1]

    @property
    def tokens_read(self) -> int:
        """Tokens that passed the model, those of samples included."""
        return self._read[0]

    @property
    def differentiated(self) -> bool:
        """True once backward passes were made."""
        return self._sensitivity is not None

    @torch.no_grad()
    def stream(self, visit: Callable[[UnitView], None], split: str = "train") -> None:
        """Dense forward over a split; `visit` sees every unit of every batch."""
        rows = self.text.train if split == "train" else self.text.calibration
        with observed(self.model, visit):
            self._run_decoder(rows, f"dense pass ({split})")

    @torch.no_grad()
    def loss(self, bypassed_sites: Collection[Site], tokens: int | None = None) -> float:
        """LM loss, nats per token, with some sites skipped by every token."""
        with bypassed(self.model, frozenset(bypassed_sites)):
            return self._mean_loss(self._scored(tokens))

    def sensitivity(self) -> dict[Site, float]:
        """Root mean square of d(mean LM loss)/d(unit output), from backward passes; made once."""
        if self._sensitivity is None:
            self._sensitivity = self._measure_sensitivity()
        return dict(self._sensitivity)

    def _measure_sensitivity(self) -> dict[Site, float]:
        sums: dict[Site, Tensor] = {}
        count = 0

        def add(site: Site, gradient_ND: Tensor) -> None:
            total = gradient_ND.float().square().sum(-1).sum()
            sums[site] = sums[site] + total if site in sums else total

        with unit_gradients(self.model, add):
            for batch in progress(self._batches(self.text.sensitivity), "sensitivity"):
                language_model_loss(self.model, batch).backward()
                count += batch.numel()
        scale = count * self.shape.width
        return {site: float((total / scale).sqrt()) for site, total in sums.items()}

    def swiglu(self, site: Site) -> SwiGLU:
        """The weights of an MLP unit.

        Raises:
            UserError: it has no neurons that a forecaster could keep.
        """
        try:
            return weights_of(layers_of(self.model)[site.layer])
        except ValueError as error:
            raise UserError(f"{site.key}: {error} (set method.neurons=0)") from error

    def sample(self, share: float = 0.25) -> ModelProbe:
        """The same on the first rows of the text; what it reads counts here. Once: then itself."""
        if self._is_sample:
            return self

        def first(rows: Tensor) -> Tensor:
            return rows[: max(1, round(len(rows) * share))]

        part = copy.copy(self)
        part._is_sample = True
        texts = (self.text.train, self.text.calibration)
        train, calibration = map(first, texts)
        part.text = replace(self.text, train=train, calibration=calibration)
        return part

    @torch.no_grad()
    def routed_scores(self, threshold: float) -> RoutedScores:
        """Route the calibration text with this threshold; the method's own is put back."""
        scores: list[Tensor] = []
        weights: list[Tensor] = []

        def observe(site: Site, decision: Decision, valid_BT: Tensor) -> None:
            kept = decision.scores_BT[valid_BT].float()
            scores.append(kept)
            weights.append(torch.full_like(kept, float(len(site.units))))

        before = self.method.threshold.clone()
        self.method.threshold.fill_(threshold)
        try:
            with routed(self.model, self.method, "gathered"):
                routing = routing_of(self.model)
                routing.observer = observe
                self._run_decoder(self.text.calibration, "calibration")
                usage = routing.counters.read()
        finally:
            self.method.threshold.copy_(before)
        note(f"realised {usage.sparsity():.3f}")
        home = input_device(self.model)

        def joined(parts: list[Tensor]) -> Tensor:
            return torch.cat([part.to(home) for part in parts]) if parts else torch.zeros(0)

        return RoutedScores(
            sparsity=usage.sparsity(),
            scores=joined(scores),
            weights=joined(weights),
            total_weight=float(usage.tokens * len(self.shape.units())),
            fixed_weight=float(usage.tokens * len(usage.dropped)),
            flops_ratio=flops_ratio(self.method, usage) if usage.tokens else 1.0,
        )

    @torch.no_grad()
    def routed_loss(self, tokens: int | None = None) -> float:
        """LM loss of the routed model, nats per token, on the same text as `loss`."""
        with routed(self.model, self.method, "gathered"):
            return self._mean_loss(self._scored(tokens))

    def _scored(self, tokens: int | None) -> Tensor:
        """Rows of calibration text, or about so many tokens of training text."""
        if tokens is None:
            return self.text.calibration
        return self.text.train[: max(1, round(tokens / self.text.train.shape[1]))]

    def _mean_loss(self, rows: Tensor) -> float:
        total = 0.0
        for batch in progress(self._batches(rows), "loss"):
            total += float(language_model_loss(self.model, batch)) * batch.numel()
        return total / rows.numel()

    def _run_decoder(self, rows: Tensor, label: str) -> None:
        for batch in progress(self._batches(rows), label):
            decoder(self.model)(input_ids=batch, use_cache=False)

    def _batches(self, rows: Tensor) -> list[Tensor]:
        size = max(1, self.batch_tokens // rows.shape[1])
        device = input_device(self.model)
        self._read[0] += rows.numel()
        return [rows[i : i + size].to(device) for i in range(0, len(rows), size)]
