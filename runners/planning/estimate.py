"""Estimate what the points of a sweep would take: tokens, FLOPs, memory, hours; and what is there.

Formulas over the model's sizes and the method's own `cost`. How often a fit or a calibration reads
its text is up to the method's code, so the recipe runs once on a tiny model of as many layers, on
shorter text in the budget's proportions.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from methods.base import Method, Shape, Stage, StageBudget
from methods.engine.decoder.families import shape_of
from methods.engine.measure.flops import dense_flops
from runners.base_model.config import model_config, weights_are_here
from runners.base_model.load import build_budget
from runners.base_model.synthetic import random_model
from runners.content import with_content
from runners.corpus.rows import ProbeText
from runners.corpus.source import stream_documents
from runners.point import (
    TargetOutOfReach,
    build,
    build_method,
    check_reach,
    make_method,
    stage_keys,
)
from runners.point_config import PointConfig
from runners.store.files import cache_root
from runners.store.run_folder import RunFolder
from runners.store.stage_cache import StageCache, content_key
from runners.training.loop import Allowance, Loop, lengthened, recipe
from runners.training.probe import ModelProbe

PASS = 2048
"""Tokens of one forward of a fit or a calibration."""
REHEARSED, ROW = 2048, 32
"""Tokens of training text that the tiny model reads at most, and of a row of it."""
TINY = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "initializer_range": 0.1,
    "tie_word_embeddings": True,
}
RECIPE = ("method", "model", "data", "budget", "objective", "seed")
"""Sections that the stages of a point depend on, beside its target."""
CALIBRATIONS = 3
"""Of a usual search for a target in FLOPs."""
ADAM_BYTES = 12
"""Gradient and two moments of a trained parameter, float32."""
BYTES_PER_TOKEN = {"tiny": 1.0, "shape": 1.0}
"""By model source; other tokenizers make a token of about four bytes of English."""


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


class Read(NamedTuple):
    """What a stage's fits and calibrations read."""

    tokens: float
    backward: bool
    """True if some of it was differentiated."""


class Planner:
    """Estimates points on one device.

    Args:
        hardware: a file of conf/hardware.
        options: the group `plan` of conf/plan.yaml.
    """

    def __init__(self, hardware: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        self.hardware, self.options = hardware, options

    def point(self, config: PointConfig) -> PlannedPoint:
        """Plan one point of a sweep.

        Raises:
            UserError: no sizes of the model, or an option that the method refuses.
        """
        config = with_content(config)
        folder = RunFolder(Path(config.store.results_dir) / config.fingerprint)
        label = " ".join(filter(None, (config.label, config.variant)))
        planned = PlannedPoint(label, config.fingerprint, folder.is_complete())
        sizes, dtype = model_config(config.model, config.store.cache_dir), self._dtype(config)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(sizes, dtype=dtype)
            try:
                method = build_method(config, model)
                check_reach(method, config.method.name)
            except TargetOutOfReach as error:
                planned.refused = str(error)
                return planned
        held = {"weights": _bytes(model), "added": _bytes(method)}
        cached = self._cached(config)
        key = content_key(*(config.resolved[name] for name in RECIPE))
        read, budget = _rehearse(config, sizes, method), build_budget(config.budget)
        allowance = Allowance(config.budget.tokens, recipe(method, budget))
        aim = [config.target, config.sparsity]
        for number, stage in enumerate(recipe(method, budget)):
            allowed = allowance.of(stage, round(sum(part.tokens for part in planned.parts)))
            if stage.budget is not None:
                longer = lengthened(stage.budget, allowed, read[stage.name].tokens)
                stage = replace(stage, budget=longer)
            key = content_key(key, stage.name, stage.per_target and aim)
            part = self._stage(stage, key, method, held, read[stage.name], config, dtype)
            part.cached = cached[number] if cached else None
            planned.parts.append(part)
        planned.parts += self._evaluations(config, method, held, planned, dtype)
        return planned

    def _stage(
        self,
        stage: Stage,
        key: str,
        method: Method,
        held: Mapping[str, int],
        read: Read,
        config: PointConfig,
        dtype: torch.dtype,
    ) -> Part:
        """One stage: what its fits read, and the steps of its gradient, all units executed."""
        assert method.shape is not None
        shape, size = method.shape, dtype.itemsize
        memory = {"activations": int(PASS * _alive(shape) * size)}
        tokens, flops = read.tokens, read.tokens * _flops_per_token(shape, config.budget.seq_len)
        if stage.fit is not None:
            memory["statistics"] = stage.fit_bytes
        if read.backward:  # of the sensitivities, before anything is summed
            backward = int(PASS * shape.layers * _kept(shape) * size) - stage.fit_bytes
            memory["activations"] = max(memory["activations"], backward)
        if stage.loss is not None and stage.budget is not None:
            spent, batch = stage.budget.tokens, stage.budget.batch_size * stage.budget.seq_len
            once = _flops_per_token(shape, stage.budget.seq_len)
            added = sum(sum((c.route, c.approximate)) for c in map(method.cost, method.sites()))
            tokens += spent
            if stage.forward == "dense":  # forecasters alone learn: no backward through the model
                flops += spent * (once + 3 * added)
            else:  # frozen weights have no gradient: a backward pass costs what a forward does
                teacher = (config.objective == "distill") / (
                    max(1, len(stage.targets)) if stage.share_text else 1
                )
                flops += spent * ((2 + teacher) * once + 3 * added)
                memory["activations"] = int(batch * shape.layers * _kept(shape) * size)
            trained = sum(p.numel() for p in stage.parameters) + _lora_parameters(stage, shape)
            memory["optimiser"] = ADAM_BYTES * trained
        return Part(stage.name, key, tokens, flops, {**held, **memory}, self._hours(flops, dtype))

    def _evaluations(
        self,
        config: PointConfig,
        method: Method,
        held: Mapping[str, int],
        planned: PlannedPoint,
        dtype: torch.dtype,
    ) -> list[Part]:
        """The dense model's, which a sweep shares, and the routed one's, all units executed."""
        assert method.shape is not None
        tokens, planned.not_estimated = evaluation_tokens(config, self.options)
        settings = config.eval.perplexity
        row = int(min(settings.context, settings.most_tokens))
        flops = tokens * _flops_per_token(method.shape, row)
        rows = settings.batch_size * settings.context
        sizes = {**held, "activations": int(rows * _alive(method.shape) * dtype.itemsize)}
        hours = self._hours(flops, dtype)
        shared = content_key(
            "dense", *(config.resolved[name] for name in ("model", "data", "eval"))
        )
        parts = [Part("evaluate dense", shared, tokens, flops, sizes, hours)]
        if method.sites():
            own = content_key("routed", planned.fingerprint)
            parts.append(Part("evaluate", own, tokens, flops, sizes, hours))
        return parts

    def _hours(self, flops: float, dtype: torch.dtype) -> float:
        peak = self.hardware["peak_tflops"][str(dtype).removeprefix("torch.")] * 1e12
        return flops / (peak * float(self.options["utilisation"])) / 3600

    def _dtype(self, config: PointConfig) -> torch.dtype:
        asked = config.placement.dtype
        name = self.hardware["dtype"] if asked == "auto" else asked
        dtype = getattr(torch, name)
        assert isinstance(dtype, torch.dtype)
        return dtype

    def _cached(self, config: PointConfig) -> list[bool] | None:
        """Of each stage whether its product is in the cache; None where that cannot be known."""
        if not self.options["cached"] or not weights_are_here(config.model, config.store.cache_dir):
            return None
        cache = StageCache(cache_root(config.store.cache_dir))
        keys = stage_keys(config, build(config))
        return [cache.product(key).is_file() for _, key in keys]


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


def evaluation_tokens(config: PointConfig, options: Mapping[str, Any]) -> tuple[float, list[str]]:
    """Tokens that one evaluation reads, and the names of texts and tasks that are not known.

    Args:
        options: the group `plan`: tokens of texts and tasks.
    """
    settings, texts, tasks = config.eval, options["texts"], options["tasks"]
    total, long = _document_tokens(config, options), settings.long_context
    total += sum(
        _least(texts.get(name, 0), settings.token_perplexity.tokens) for name in settings.texts
    )
    if long is not None:
        size = _least(texts.get(long.text, 0), long.tokens)
        total += sum(size * context / long.stride for context in long.contexts)
    for name in set(settings.tasks) & set(tasks):
        shots = settings.num_fewshot.get(name, 0)
        per_item = tasks[name]["tokens"] + shots * tasks[name]["shot"]
        total += _least(tasks[name]["items"], settings.limit) * per_item
    if (own := settings.generation) is not None:
        total += own.prompts * (own.prompt_tokens + own.new_tokens)
    unknown = [name for name in settings.texts if name not in texts]
    return total, unknown + [name for name in settings.tasks if name not in tasks]


def _document_tokens(config: PointConfig, options: Mapping[str, Any]) -> float:
    """Of the data's own test split; a local one is measured."""
    data, most = config.data, config.eval.perplexity.most_tokens
    limit = config.eval.perplexity.documents_limit
    if data.source == "hub" and data.dir is None:
        known = _least(options["documents"], data.documents_limit)
        return float((known if limit is None else limit) * min(options["document_tokens"], most))
    size = BYTES_PER_TOKEN.get(config.model.source, 4.0)
    documents = itertools.islice(stream_documents(data, "test"), limit)
    return float(sum(min(len(document.text) / size, most) for document in documents))


def _least(number: float, limit: float | None) -> float:
    return number if limit is None else min(number, limit)


def _rehearse(config: PointConfig, sizes: PretrainedConfig, planned: Method) -> dict[str, Read]:
    """What each stage's fits and calibrations read, from a run on a tiny model.

    It aims at the sparsity of the planned method, also where the target is one of FLOPs: what those
    of a tiny model leave to be saved says nothing. A search for FLOPs calibrates a few times.

    Returns:
        By the stage's name, without the steps of a gradient.
    """
    budget = build_budget(config.budget)
    scale = max(1.0, budget.fit_tokens / REHEARSED)
    model = _tiny(str(sizes.model_type), shape_of(sizes).layers)
    asked = config.method, planned.sparsity, config.seed, model
    method = make_method(*asked, reserve=config.reserve)
    wanted = (budget.fit_tokens, budget.calibration_tokens, budget.sensitivity_tokens)
    text = ProbeText(*(_rows(max(1, round(tokens / scale / ROW))) for tokens in wanted))
    probe = ModelProbe(model, method, text)
    objective, seed = config.objective, config.seed
    loop = Loop(model, method, probe, lambda _: _rows(1), objective=objective, seed=seed)
    step = StageBudget(steps=1, batch_size=1, seq_len=ROW)
    read = {}
    for stage in recipe(method, budget):
        before = probe.differentiated
        report = loop.run(stage if stage.loss is None else replace(stage, budget=step))
        own = 0 if stage.loss is None else step.tokens
        backward = probe.differentiated and not before
        read[stage.name] = Read(scale * float(report.tokens - own), backward)
    if config.target == "flops":
        read["calibrate"] = Read(CALIBRATIONS * read["calibrate"].tokens, False)
    return read


@functools.lru_cache(maxsize=1)
def _tiny(family: str, layers: int) -> PreTrainedModel:
    sizes = {**TINY, "num_hidden_layers": layers}
    return random_model(family=family, sizes=sizes, seed=0)[0].requires_grad_(False)


def _rows(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(3, 250, (count, ROW), generator=generator)


def _flops_per_token(shape: Shape, row: int) -> float:
    """Of a dense forward with all logits, in rows of so many tokens."""
    return dense_flops(shape, tokens=1, context=(row + 1) // 2)


def _alive(shape: Shape) -> float:
    """Numbers a token that a forward without gradient holds at its widest place, an MLP."""
    return 4.0 * shape.width + 3.0 * shape.mlp_width


def _kept(shape: Shape) -> float:
    """Numbers a token that one layer keeps for its backward pass on the masked path."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    # inputs and outputs of norms (in float32), projections, gates; q, k, v, rotated; SwiGLU's four
    return 12.0 * shape.width + 3.0 * (queries + keys) + 4.0 * shape.mlp_width


def _lora_parameters(stage: Stage, shape: Shape) -> int:
    if stage.lora is None:
        return 0
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    ends = dict.fromkeys(("gate", "up", "down"), shape.width + shape.mlp_width)
    ends |= {"q": shape.width + queries, "o": shape.width + queries}
    ends |= dict.fromkeys(("k", "v"), shape.width + keys)
    return shape.layers * stage.lora.rank * sum(ends[name] for name in stage.lora.targets)


def _bytes(module: torch.nn.Module) -> int:
    """Of parameters and buffers, tied ones once."""
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())
