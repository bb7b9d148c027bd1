"""The work of one point: recipe, calibration, evaluation."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from methods.base import Budget, Method, Probe, Stage
from methods.engine.checkpoint import restore, save_pretrained
from methods.engine.decoder.placement import input_device, spread
from methods.engine.lora import Adapter, attach_lora, describe
from runners.base_model.embedded import cache_root
from runners.base_model.load import build_budget, build_method, load_base, method_options
from runners.corpus.rows import Texts, encoder, read_documents
from runners.corpus.source import check_source
from runners.errors import UserError
from runners.evaluation.evaluate import evaluate, evaluation_key
from runners.point_config import BudgetConfig, DataConfig, parse_section
from runners.runtime.processes import is_main_process
from runners.store.items import write_items
from runners.store.provenance import code_version, provenance
from runners.store.run_folder import RunFolder
from runners.store.stage_cache import Products, content_key
from runners.tracking.base import Safe
from runners.training.checkpoints import Checkpoints
from runners.training.loop import Loop
from runners.training.probe import ModelProbe

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]
STAGE_CODE = [ROOT / "methods", ROOT / "runners" / "training"]


class Point:
    """One method at one target on one model and text.

    Args:
        config: resolved and checked.
        folder: where the record goes; events are logged there.
        tracker: gets the stage curves.
    """

    def __init__(self, config: dict[str, Any], folder: RunFolder, tracker: Safe) -> None:
        self.config, self.folder, self.tracker = config, folder, tracker
        torch.manual_seed(config["seed"])
        data = parse_section(DataConfig, config["data"])
        check_source(data)
        self.base = load_base(config)
        encode = encoder(self.base.tokenizer)
        self.documents = read_documents(
            data,
            parse_section(BudgetConfig, config["budget"]),
            config["eval"]["perplexity"]["documents_limit"],
            config["seed"],
            encode,
        )
        self.budget = build_budget(config)
        self.method = build_method(config, self.base.model)
        check_reach(self.method, config["method"]["name"])
        self.texts = Texts(
            self.documents,
            encode,
            config["budget"]["seq_len"],
            config["seed"],
            fit_tokens=self.budget.fit_tokens,
        )
        self.probe = ModelProbe(self.base.model, self.method, self.texts.for_probe(self.budget))
        writes = is_main_process()
        self.products = Products(cache_root(config["cache_dir"]) if writes else folder.path)
        self.reports: list[dict[str, Any]] = []
        self.realised: float | None = None
        """Sparsity on calibration text, where the calibration said it."""

    def train(self) -> None:
        """Run every stage of the recipe, or load its product; then calibrate."""
        if spread(self.base.model):
            check_gradients(self.config["method"]["name"], recipe(self.method, self.budget))
        loop = Loop(
            self.base.model,
            self.method,
            self.probe,
            self.texts.rows,
            objective=self.config["objective"],
            seed=self.config["seed"],
            on_step=self._on_step,
            on_start=self.folder.events.go_back,
        )
        for stage, key in self.stage_keys():
            if stage.lora is not None:
                attach_lora(self.base.model, self.method, stage.lora, seed=self.config["seed"])
            saved = Checkpoints(self.products.checkpoints(key), self.config["checkpoint_seconds"])
            report = self.products.stage(key, self.method, partial(_run, loop, stage, saved))
            self.reports.append(report)
            self._put_in_order(stage.name, report)
            self.folder.log({"event": "stage", **report})
            log.info("stage %s %s", stage.name, "from the cache" if report["cached"] else "done")
        self.realised = self.reports[-1]["figures"].get("realised")

    def save(self) -> None:
        """Write what was added to the model to `routed/` of the point's folder."""
        save_pretrained(
            self.method,
            self.folder.path / "routed",
            target=self.config["method"]["_target_"],
            options=method_options(self.config),
            base={
                "name": self.base.name,
                "path": self.config["model"]["path"],
                "source": self.config["model"]["source"],
                "revision": self.base.revision,
                "seed": self.config["seed"],
                "weights_sha256": self.base.weights_hash,
            },
        )

    def restore(self, saved: Path, *, recalibrate: bool) -> None:
        """Load a saved method instead of training it; `recalibrate` moves it to this target."""
        restore(self.method, saved, self.base.model)
        if self.config["trained_on_sha256"] != self.base.weights_hash:
            log.warning("%s was trained on other weights (or another dtype) than these", saved)
        if recalibrate:
            self.realised = self.method.calibrate(self.probe, self.method.sparsity)

    def evaluate(self) -> dict[str, Any]:
        """The record's figures: quality with the dense model's beside it, sparsity, cost."""
        test = self.documents["test"]
        key = evaluation_key(self.config, self.base, test)
        dense_samples = self.products.values / f"{key}.samples"
        dense, _ = self.products.value(
            key, lambda: evaluate(self.config, self.base, test, samples_dir=dense_samples)
        )
        if isinstance(self.method.adapter, Adapter):
            self.method.adapter.merged = self.config["merge_lora"]
        routes = bool(self.method.sites())
        samples = self.folder.path / "samples"
        if routes:
            scores = evaluate(self.config, self.base, test, self.method, samples)
        else:
            scores = dense
            if dense_samples.is_dir():
                shutil.copytree(dense_samples, samples, dirs_exist_ok=True)
        write_items(self.folder.items_file, scores["items"], dense["items"])
        record = merge_dense(scores, dense)
        record["stages"] = self.reports
        threshold = float(self.method.threshold)
        if self.realised is None:
            self.realised = self.probe.routed_scores(threshold).sparsity if routes else 0.0
        record["realised"] = {
            **record["realised"],
            "calibration": self.realised,
            "achievable": self.method.achievable(self.method.sparsity),
        }
        record["added_parameters"] = sum(p.numel() for p in self.method.parameters())
        record["options"] = method_options(self.config)
        record["kv_policy"] = self.method.kv_policy
        record["lora"] = describe(self.method.adapter)
        record["threshold"] = threshold if math.isfinite(threshold) else None
        record["identity"] = {
            "fingerprint": self.folder.path.name,
            "weights_sha256": self.base.weights_hash,
            "dtype": str(next(self.base.model.parameters()).dtype).removeprefix("torch."),
            "objective": self.config["objective"],
            "budget": self.budget.name,
            "upper_bound": self.method.upper_bound,
            **provenance(),
        }
        return record

    def stage_keys(self) -> Iterator[tuple[Stage, str]]:
        """Each stage of the recipe with the key of its product."""
        key = self._recipe_key()
        for stage in recipe(self.method, self.budget):
            target = self.method.sparsity if stage.per_target else None
            key = content_key(key, stage.name, target)
            yield stage, key

    def _recipe_key(self) -> str:
        """Hash of all that determines the stages' products, the target sparsity left out."""
        options = {k: v for k, v in method_options(self.config).items() if k != "sparsity"}
        return content_key(
            self.base.weights_hash,
            self.texts.digest(self.budget),
            self.config["method"]["_target_"],
            options,
            self.config["budget"],
            self.config["objective"],
            self.config["seed"],
            code_version(*STAGE_CODE),
            str(input_device(self.base.model).type),
            torch.__version__,
        )

    def _put_in_order(self, stage: str, report: dict[str, Any]) -> None:
        """A curve that another point's process finished is in that point's log, and only there."""
        events, steps = self.folder.events, report["steps"]
        here = not report["cached"] or events.has_curve(stage, steps)
        events.go_back(stage, steps if here else 0)

    def _on_step(self, stage: str, figures: dict[str, float]) -> None:
        self.folder.log({"event": "step", "stage": stage, **figures})
        self.tracker.log({f"{stage}/{key}": value for key, value in figures.items()})


def recipe(method: Method, budget: Budget) -> Iterator[Stage]:
    """`fit`, the method's own recipe, and the calibration as its last step."""
    if type(method).fit is not Method.fit:
        yield Stage("fit", fit=method.fit)
    yield from method.stages(budget)
    figures: dict[str, float] = {}

    def calibrate(probe: Probe) -> None:
        found = method.calibrate(probe, method.sparsity)
        if found is not None:
            figures["realised"] = found

    yield Stage("calibrate", fit=calibrate, report=lambda probe: figures, per_target=True)


def check_reach(method: Method, name: str) -> None:
    """Refuse a target that the method's sites cannot realise, before anything is trained.

    Raises:
        UserError: they cover too few of the model's units.
    """
    if method.achievable(method.sparsity) > method.reach() + 1e-6:
        raise UserError(
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


def _run(loop: Loop, stage: Stage, saved: Checkpoints) -> dict[str, Any]:
    return loop.run(stage, saved).to_dict()


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
    return record
