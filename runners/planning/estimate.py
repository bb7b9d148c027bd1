"""What the points of a sweep would take: tokens, FLOPs, memory, hours; and what is there."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from methods.base import Method, Stage
from methods.engine.decoder.adapter import shape_of
from runners.base_model.config import model_config, weights_are_here
from runners.base_model.embedded import cache_root
from runners.base_model.load import build_budget, build_method
from runners.errors import UserError
from runners.job import describe, variant
from runners.planning.dry_run import (
    Cost,
    forward_cost,
    meta_model,
    sensitivity_cost,
    step_cost,
    visit_cost,
)
from runners.planning.evaluation_tokens import evaluation_tokens
from runners.planning.rehearsal import Rehearsal, Rehearsed
from runners.point import Point, check_reach, recipe
from runners.store.run_folder import RunFolder, fingerprint
from runners.store.stage_cache import content_key
from runners.tracking.base import Safe

log = logging.getLogger(__name__)

PASS_TOKENS = 2048
"""Tokens of one forward of a fit (`ModelProbe`)."""
ADAM_BYTES = 8
"""Two float32 moments a parameter; gradients are counted with the step."""


@dataclass
class Part:
    """A stage, or an evaluation, of a point."""

    name: str
    key: str
    """Equal for parts that points share: they are done, and counted, once."""
    tokens: float
    flops: float
    bytes: dict[str, int]
    hours: float
    cached: bool | None = None
    """None: not known, as the model's weights or text are not here."""


@dataclass
class PlannedPoint:
    """One point: its parts, and whether it has its record."""

    label: str
    fingerprint: str
    complete: bool
    parts: list[Part] = field(default_factory=list)
    not_estimated: list[str] = field(default_factory=list)
    refused: str | None = None
    """Why the sweep would record it as failed."""

    @property
    def peak_bytes(self) -> int:
        """Of its hungriest part."""
        return max((sum(part.bytes.values()) for part in self.parts), default=0)


class Planner:
    """Estimates points on one device.

    Args:
        hardware: a file of conf/hardware.
        options: the group `plan` of conf/plan.yaml.
    """

    def __init__(self, hardware: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        self.hardware, self.options = hardware, options
        self._costs: dict[str, Cost] = {}

    def point(self, config: dict[str, Any]) -> PlannedPoint:
        """Plan one point of a sweep from its resolved config.

        Raises:
            UserError: no sizes of the model, or an option that the method refuses.
        """
        name = fingerprint(config)
        folder = RunFolder(Path(config["results_dir"]) / name)
        label = " ".join(filter(None, (describe(config), variant(config))))
        planned = PlannedPoint(label, name, folder.is_complete())
        model, dtype = _meta(_model_words(config), self._dtype(config))
        with torch.device("meta"):
            method = build_method(config, model)
        try:
            check_reach(method, config["method"]["name"])
        except UserError as error:
            planned.refused = str(error)
            return planned
        static = {"weights": _bytes(model), "added": _bytes(method)}
        rehearsed = _rehearsed(config, model)
        known = self._cached(config, folder) or [None] * len(rehearsed)
        key = content_key(_shared_words(config))
        for step, cached in zip(rehearsed, known, strict=True):
            key = content_key(key, step.stage.name, step.stage.per_target and config["sparsity"])
            part = self._stage(config, model, method, step, static, key, dtype)
            part.cached = cached
            planned.parts.append(part)
        planned.parts += self._evaluations(config, model, method, static, dtype, planned)
        return planned

    def _stage(
        self,
        config: Mapping[str, Any],
        model: PreTrainedModel,
        method: Method,
        step: Rehearsed,
        static: Mapping[str, int],
        key: str,
        dtype: torch.dtype,
    ) -> Part:
        """A stage's own cost and what its fits and calibrations read."""
        read, stage = step.reading, step.stage
        once = _pass_cost(model, dtype)
        flops = (read.dense + read.routed) * once.flops / PASS_TOKENS
        tokens = read.dense + read.routed + read.backward
        passes = tokens / PASS_TOKENS
        sizes = {"activations": once.bytes}
        if read.backward:
            slope = sensitivity_cost(model, batch=1, tokens=PASS_TOKENS)
            flops += read.backward * slope.flops / PASS_TOKENS
            sizes["activations"] = max(once.bytes, slope.bytes)
        own = next((s for s in _stages(method, config) if s.name == stage.name), stage)
        if read.visited and own.fit is not None:
            fit = own.fit
            seen = self._known(config, stage, lambda: visit_cost(model, method, fit, PASS_TOKENS))
            flops += read.visited * seen.flops / PASS_TOKENS
            sizes["statistics"] = seen.bytes
        if own.loss is not None and own.budget is not None:
            target = config["sparsity"]
            cost = self._known(
                config, stage, lambda: step_cost(model, method, own, config["objective"], target)
            )
            micro = own.budget.steps * own.budget.accumulate
            flops += micro * cost.flops
            tokens += own.budget.tokens
            passes += micro * (2 if own.forward == "dense" else 3)
            sizes["activations"] = max(sizes["activations"], cost.bytes)
            sizes["optimiser"] = ADAM_BYTES * cost.trained
        hours = self._hours(flops, passes * static["weights"], dtype)
        return Part(stage.name, key, tokens, flops, {**static, **sizes}, hours)

    def _evaluations(
        self,
        config: Mapping[str, Any],
        model: PreTrainedModel,
        method: Method,
        static: Mapping[str, int],
        dtype: torch.dtype,
        planned: PlannedPoint,
    ) -> list[Part]:
        """The dense model's, which a sweep shares, and the routed one's (as if nothing were
        bypassed)."""
        tokens, unknown = evaluation_tokens(config, self.options)
        planned.not_estimated = unknown
        settings = config["eval"]["perplexity"]
        context = int(settings["context"])
        once = forward_cost(model, batch=int(settings["batch_size"]), tokens=context, head=False)
        per_token = once.flops / (settings["batch_size"] * context)
        per_token += 2.0 * model.config.hidden_size * model.config.vocab_size
        hours = self._hours(tokens * per_token, static["weights"] * tokens / PASS_TOKENS, dtype)
        sizes = {**static, "activations": once.bytes}
        shared = content_key("dense", config["model"], config["data"], config["eval"])
        parts = [Part("evaluate dense", shared, tokens, tokens * per_token, sizes, hours)]
        if method.sites():
            own = content_key("routed", planned.fingerprint)
            parts.append(Part("evaluate", own, tokens, tokens * per_token, sizes, hours))
        return parts

    def _known(self, config: Mapping[str, Any], stage: Stage, make: Callable[[], Cost]) -> Cost:
        """A stage's cost, which its target does not change: counted once for a sweep."""
        key = content_key(_shared_words(config, without=("sparsity",)), stage.name)
        if key not in self._costs:
            self._costs[key] = make()
        return self._costs[key]

    def _hours(self, flops: float, moved_bytes: float, dtype: torch.dtype) -> float:
        name = str(dtype).removeprefix("torch.")
        peak = self.hardware["peak_tflops"][name] * 1e12 * self.options["utilisation"]
        moved = moved_bytes / (self.hardware["bandwidth_gb_per_s"] * 1e9)
        return max(flops / peak, moved) / 3600

    def _dtype(self, config: Mapping[str, Any]) -> str:
        return str(self.hardware["dtype"] if config["dtype"] == "auto" else config["dtype"])

    def _cached(self, config: dict[str, Any], folder: RunFolder) -> list[bool | None] | None:
        """Of each stage whether its product is in the cache; None where that cannot be known."""
        if not self.options["cached"] or not weights_are_here(config):
            return None
        try:
            point = Point(config, folder, Safe(None))
        except UserError as error:
            log.warning("cached stages unknown: %s", error)
            return None
        stages = cache_root(config["cache_dir"]) / "stages"
        return [(stages / key / "report.json").is_file() for _, key in point.stage_keys()]


def totals(points: list[PlannedPoint]) -> dict[str, float]:
    """Sums over a sweep, a shared part once; `left` leaves out what is complete or cached."""
    points = list({point.fingerprint: point for point in points}.values())
    every = {part.key: part for point in points for part in point.parts}
    open_points = [point for point in points if not point.complete and point.refused is None]
    left = {part.key: part for point in open_points for part in point.parts if not part.cached}
    return {
        "points": len(points),
        "points_left": len(open_points),
        "tokens": sum(part.tokens for part in every.values()),
        "flops": sum(part.flops for part in every.values()),
        "hours": sum(part.hours for part in every.values()),
        "hours_left": sum(part.hours for part in left.values()),
        "peak_bytes": max(point.peak_bytes for point in points),
    }


def to_json(points: list[PlannedPoint], hardware: Mapping[str, Any]) -> dict[str, Any]:
    """The plan as plain data."""
    listed = [{**asdict(point), "peak_bytes": point.peak_bytes} for point in points]
    return {"hardware": dict(hardware), "points": listed, "total": totals(points)}


def _model_words(config: Mapping[str, Any]) -> str:
    return json.dumps({"model": config["model"], "cache_dir": config["cache_dir"]}, sort_keys=True)


def _shared_words(config: Mapping[str, Any], without: Sequence[str] = ()) -> str:
    """All that a recipe depends on beside its target, the weights and the text themselves."""
    keys = ("method", "model", "data", "budget", "objective", "seed", "cache_dir")
    words = {key: config[key] for key in keys}
    words["method"] = {k: v for k, v in config["method"].items() if k not in without}
    return json.dumps(words, sort_keys=True)


@functools.lru_cache(maxsize=1)
def _meta(words: str, dtype: str) -> tuple[PreTrainedModel, torch.dtype]:
    kind = getattr(torch, dtype)
    return meta_model(model_config(json.loads(words)), kind), kind


@functools.lru_cache(maxsize=4)
def _pass_cost(model: PreTrainedModel, dtype: torch.dtype) -> Cost:
    return forward_cost(model, batch=1, tokens=PASS_TOKENS, head=False)


def _rehearsed(config: Mapping[str, Any], model: PreTrainedModel) -> list[Rehearsed]:
    layers = shape_of(model.config).layers
    family = str(model.config.model_type)
    return Rehearsal(config, family, layers, build_budget(config)).run()


def _stages(method: Method, config: Mapping[str, Any]) -> list[Stage]:
    return list(recipe(method, build_budget(config)))


def _bytes(module: torch.nn.Module) -> int:
    """Of parameters and buffers, tied ones once."""
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())
