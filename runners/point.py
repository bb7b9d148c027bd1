"""The work of one point: build, train, calibrate, save, evaluate, record."""

from __future__ import annotations

import inspect
import logging
import math
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from methods.base import Budget, Method, OutOfReach, Stage
from methods.engine import checkpoint
from methods.engine.decoder.families import shape_of
from methods.engine.decoder.placement import input_device, spread
from methods.engine.lora import LoraFactors, attach_lora, describe
from methods.engine.routed import attach
from runners.base_model.load import Base, build_budget, load_base
from runners.base_model.saved import require_weights
from runners.corpus.rows import Texts, encoder, read_documents
from runners.corpus.source import check_source
from runners.errors import UserError
from runners.evaluation.evaluate import evaluate as evaluate_model
from runners.evaluation.evaluate import evaluation_key
from runners.evaluation.generation import continuations, generation
from runners.point_config import MethodConfig, PointConfig, SavedConfig
from runners.runtime.processes import is_main_process
from runners.runtime.progress import Bar
from runners.store.files import cache_root
from runners.store.items import write_items
from runners.store.provenance import provenance, stage_version
from runners.store.record import Record
from runners.store.run_folder import RunFolder
from runners.store.stage_cache import StageCache, content_key
from runners.tracking.base import Safe, curves
from runners.training.flops_target import (
    Saved,
    calibrate_saving,
    retarget,
    sparsity_saving,
)
from runners.training.loop import Allowance, Loop, recipe
from runners.training.probe import ModelProbe
from runners.training.state import Checkpoint

log = logging.getLogger(__name__)


class TargetOutOfReach(UserError):
    """A target that a method cannot realise, known before it is trained."""


@dataclass(frozen=True)
class Built:
    """A model, the text of its three splits, and a method that is attached but not trained."""

    base: Base
    texts: Texts
    budget: Budget
    method: Method
    probe: ModelProbe


@dataclass
class Trained:
    """What the stages of a recipe reported, and the sparsity that the calibration realised."""

    stages: list[dict[str, Any]] = field(default_factory=list)
    realised: float | None = None


def build(config: PointConfig) -> Built:
    """Load the model and its text, and attach the method to it.

    Raises:
        UserError: model or text cannot be read, or the target is out of the method's reach.
    """
    torch.manual_seed(config.seed)
    check_source(config.data)
    with Bar(desc="loading the model"):
        base = load_base(config.model, config.placement, config.seed, config.store.cache_dir)
    encode, limit = encoder(base.tokenizer), config.eval.perplexity.documents_limit
    with Bar(desc="reading the text"):
        documents = read_documents(config.data, config.budget, limit, config.seed, encode)
    budget, row = build_budget(config.budget), config.budget.seq_len
    method = build_method(config, base.model)
    check_reach(method, config.method.name)
    texts = Texts(documents, encode, row, config.seed, fit_tokens=budget.fit_tokens)
    probe = ModelProbe(base.model, method, texts.for_probe(budget))
    return Built(base, texts, budget, method, probe)


def train(config: PointConfig, built: Built, folder: RunFolder, tracker: Safe) -> Trained:
    """Run every stage of the recipe, the calibration as the last one, or load its product.

    Args:
        folder: its log gets the stages' curves and reports.
    """
    method, events, trained = built.method, folder.events, Trained()

    def on_step(stage: str, figures: dict[str, float]) -> None:
        folder.log({"event": "step", "stage": stage, **figures})
        tracker.log(curves(stage, figures, apart=stage in several))

    several = {s.name for s in recipe(method, built.budget) if len(set(s.targets)) > 1}
    if spread(built.base.model):
        check_gradients(config.method.name, recipe(method, built.budget))
    loop = Loop(
        built.base.model,
        method,
        built.probe,
        built.texts.rows,
        objective=config.objective,
        seed=config.seed,
        on_step=on_step,
        on_start=events.rewind,
    )
    products = stage_cache(config, folder)
    allowance = Allowance(config.budget.tokens, recipe(method, built.budget))
    for stage, key in stage_keys(config, built):
        spent = sum(report["tokens"] for report in trained.stages)
        if stage.lora is not None:
            try:
                attach_lora(built.base.model, method, stage.lora, seed=config.seed)
            except ValueError as error:
                raise UserError(f"method {config.method.name}: {error}") from error
        kept = Checkpoint(products.checkpoint(key), config.store.checkpoint_seconds)
        run = partial(_run, loop, stage, kept, allowance.of(stage, spent))
        report = products.load_or_run(key, method, run)
        events.rewind(stage.name, report["steps"])
        folder.log({"event": "stage", **report})
        trained.stages.append(report)
    if cached := [report["name"] for report in trained.stages if report["cached"]]:
        log.info("stages from the cache: %s", ", ".join(cached))
    figures = trained.stages[-1]["figures"]
    trained.realised = figures.get("realised")
    retarget(method, figures.get("sparsity", method.sparsity))
    return trained


def save(config: PointConfig, built: Built, folder: Path) -> None:
    """Write what was added to the model to a folder, with what names its base model."""
    model, base = config.model, built.base
    local = model.source == "pretrained" and Path(model.path).is_dir()
    checkpoint.save_pretrained(
        built.method,
        folder,
        target=config.method.target,
        options={**config.method_options, "sparsity": built.method.sparsity},
        base={
            "name": base.name,
            "path": str(Path(model.path).resolve()) if local else model.path,
            "source": model.source,
            "revision": base.revision,
            "seed": config.seed,
            "weights_sha256": base.weights_hash,
            "dtype": base.dtype,
            **({} if model.config is None else {"config": model.config}),
        },
    )


def restore(config: PointConfig, saved: SavedConfig, built: Built) -> Trained:
    """Load a saved method instead of training it, and move it to another target if one is asked."""
    folder, method = Path(saved.saved), built.method
    trained_on, check = saved.trained_on_sha256, saved.check_weights
    require_weights(folder, built.base, trained_on=trained_on, check=check)
    checkpoint.restore(method, folder, built.base.model)
    if not saved.recalibrate:
        return Trained()
    if (aim := saved_flops(config)) is not None:
        return Trained(realised=calibrate_saving(method, built.probe, *aim)["realised"])
    return Trained(realised=method.calibrate(built.probe, method.sparsity))


def train_again(config: PointConfig, built: Built, folder: RunFolder, tracker: Safe) -> Trained:
    """Bring the method to where a complete point left it, from what it saved; else train it."""
    if config.saved is not None:
        return restore(config, config.saved, built)
    saved = folder.path / "routed"
    if folder.is_complete() and saved.is_dir():
        try:
            checkpoint.restore(built.method, saved, built.base.model)
        except checkpoint.BadCheckpoint as error:
            log.warning("%s: its stages are loaded or run again", error)
        else:
            return Trained()
    return train(config, built, folder, tracker)


def evaluate(config: PointConfig, built: Built, folder: RunFolder) -> dict[str, Any]:
    """Evaluate the routed model and, once for all that share it, the dense one.

    Returns:
        Figures of the routed model with the dense model's beside each; those of every item go to
        the folder.
    """
    products, test = stage_cache(config, folder), built.texts.documents["test"]
    key, shared = _dense_key(config, built)
    measure = partial(evaluate_model, config.eval, built.base, test, **shared)
    dense_samples, samples = products.values / f"{key}.samples", folder.path / "samples"
    dense, _ = products.value(key, lambda: measure(samples_dir=dense_samples))
    _merge_lora(config, built.method)
    if built.method.sites():
        scores = measure(method=built.method, mode=config.mode, samples_dir=samples)
    else:
        scores = dense
        if dense_samples.is_dir():
            shutil.copytree(dense_samples, samples, dirs_exist_ok=True)
    write_items(folder.items_file, scores["items"], dense["items"])
    return merge_dense(scores, dense) | {"generation": generate(config, built, folder)}


def generate(config: PointConfig, built: Built, folder: RunFolder) -> dict[str, Any] | None:
    """What the routed model writes beside the dense one, whose text is written once for all.

    Returns:
        Of `generation`; None where none is asked for.
    """
    settings, base = config.eval.generation, built.base
    if settings is None:
        return None
    limit = config.eval.perplexity.documents_limit
    write = partial(continuations, settings, base, built.texts.documents["test"][:limit])
    key = content_key("continuations", _dense_key(config, built)[0])
    dense, _ = stage_cache(config, folder).value(key, write)
    _merge_lora(config, built.method)
    method = built.method if built.method.sites() else None
    return generation(settings, base, dense, method=method, mode=config.mode)


def _dense_key(config: PointConfig, built: Built) -> tuple[str, dict[str, Any]]:
    """What names the dense model's figures, and the arguments that measuring shares with it."""
    shared: dict[str, Any] = {"data": config.data.name, "seed": config.seed}
    shared["cache_dir"] = cache_root(config.store.cache_dir)
    test = built.texts.documents["test"]
    return evaluation_key(config.eval, built.base, test, **shared), shared


def _merge_lora(config: PointConfig, method: Method) -> None:
    if isinstance(method.adapter, LoraFactors):
        method.adapter.merged = config.merge_lora


def record(
    config: PointConfig, built: Built, trained: Trained, scores: dict[str, Any], seconds: float
) -> Record:
    """Put together what is kept of the point."""
    method = built.method
    threshold, realised = float(method.threshold), trained.realised
    if realised is None:
        realised = built.probe.routed_scores(threshold).sparsity if method.sites() else 0.0
    scores["realised"] |= {
        "calibration": realised,
        "achievable": method.achievable(method.sparsity),
    }
    return Record(
        **config.identity,
        **scores,
        stages=trained.stages,
        added_parameters=sum(p.numel() for p in method.parameters()),
        options={**config.method_options, "sparsity": method.sparsity},
        kv_policy=method.kv_policy,
        lora=describe(method.adapter),
        threshold=threshold if math.isfinite(threshold) else None,
        identity={
            "fingerprint": config.fingerprint,
            "weights_sha256": built.base.weights_hash,
            "dtype": built.base.dtype,
            "objective": config.objective,
            "reserve": method.reserved,
            "budget": built.budget.name,
            "upper_bound": method.upper_bound,
            "static": method.static(),
            "flops_only": method.flops_only,
            **provenance(),
        },
        seconds=seconds,
    )


def stage_cache(config: PointConfig, folder: RunFolder) -> StageCache:
    """The cache that all points share; a launched process that does not lead keeps its own."""
    return StageCache(cache_root(config.store.cache_dir) if is_main_process() else folder.path)


def stage_keys(config: PointConfig, built: Built) -> Iterator[tuple[Stage, str]]:
    """Each stage of the recipe with the key of its product.

    The key is a hash of all that determines the product. The target is part of it from the first
    stage on that depends on it: what comes before is shared by the points of a sweep.
    """
    method = built.method
    key = content_key(
        built.base.weights_hash,
        built.texts.digest(built.budget),
        config.method.target,
        config.method.options,
        config.resolved["budget"],
        config.objective,
        config.reserve,
        config.seed,
        stage_version(type(method).__module__, Path(inspect.getfile(type(method)))),
        str(input_device(built.base.model).type),
        torch.__version__,
    )
    aim = saved_flops(config)
    target = method.sparsity if aim is None else [config.target, *aim]
    for stage in recipe(method, built.budget, aim):
        key = content_key(key, stage.name, target if stage.per_target else None)
        yield stage, key


def saved_flops(config: PointConfig) -> Saved | None:
    """The target, if it is one of FLOPs."""
    if config.target == "sparsity" or not config.sparsity:
        return None
    return Saved(config.sparsity, config.budget.seq_len)


def build_method(config: PointConfig, model: PreTrainedModel) -> Method:
    """Construct the method and attach it to the model; what it draws comes from the seed.

    Raises:
        TargetOutOfReach: no sparsity saves the target in FLOPs.
        UserError: an option that the method refuses.
    """
    make = partial(make_method, config.method, seed=config.seed, model=model)
    method = make(config.sparsity, reserve=config.reserve)
    if (aim := saved_flops(config)) is None:
        return method
    try:  # a recipe trains at a sparsity: the one that about saves the target
        with torch.device("cpu"):  # a plan's tensors hold nothing, and which sites run is in some
            sized = config.method.make(config.sparsity, config.reserve)
            sized.setup(shape_of(model.config))
        sparsity = sparsity_saving(sized, *aim)
    except OutOfReach as error:
        raise TargetOutOfReach(f"method {config.method.name}: {error}") from error
    return make(sparsity, reserve=config.reserve)


def make_method(
    asked: MethodConfig, sparsity: float, seed: int, model: PreTrainedModel, *, reserve: int
) -> Method:
    """As `build_method`, of what it needs of a point."""
    torch.manual_seed(seed)
    method = asked.make(sparsity, reserve)
    try:
        return attach(model, method).eval()
    except (TypeError, ValueError) as error:
        raise UserError(f"method {asked.name}: {error}") from error


def check_reach(method: Method, name: str) -> None:
    """Refuse a target that the method's sites cannot realise, before anything is trained.

    Raises:
        TargetOutOfReach: they cover too few of the model's units.
    """
    if method.achievable(method.sparsity) > method.reach() + 1e-6:
        raise TargetOutOfReach(
            f"method {name}: sparsity {method.sparsity:g} is out of reach: "
            f"it routes {method.reach():.3f} of all units of this model"
        )


def check_gradients(name: str, stages: Iterable[Stage]) -> None:
    """Refuse to train with layers on several GPUs.

    Raises:
        UserError: a stage has a loss.
    """
    trained = [stage.name for stage in stages if stage.loss is not None]
    if trained:
        raise UserError(
            f"method {name} trains {', '.join(trained)} by gradient, for which device_map must "
            "compute all layers on one GPU (some may lie on cpu or disk)"
        )


def _run(loop: Loop, stage: Stage, kept: Checkpoint, allowance: int | None) -> dict[str, Any]:
    return loop.run(stage, kept, allowance).to_dict()


def merge_dense(scores: dict[str, Any], dense: dict[str, Any]) -> dict[str, Any]:
    """Put the dense model's value beside each of the routed model's."""
    record = {k: v for k, v in scores.items() if k != "items"}
    record |= {"perplexity": {}, "accuracy": {}}
    for name, entry in scores["perplexity"].items():
        record["perplexity"][name] = {**entry, "dense": dense["perplexity"][name]["value"]}
    for task, entry in scores["accuracy"].items():
        beside = dense["accuracy"][task]
        record["accuracy"][task] = {
            **entry,
            "dense": beside["value"],
            "dense_stderr": beside["stderr"],
        }
        if "margin" in entry:
            record["accuracy"][task]["dense_margin"] = beside["margin"]
    return record
