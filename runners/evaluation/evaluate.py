"""Perplexity and tasks of the dense or the routed model, with what each realised."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from methods.base import Method
from methods.engine.measure.counters import Usage
from methods.engine.measure.flops import flops_ratio, kv_bytes_ratio
from methods.engine.routed import routed
from runners.base_model.load import Base
from runners.corpus.source import Document, digest
from runners.evaluation.builtin_tasks import GENERATORS
from runners.evaluation.perplexity import joined_perplexity, perplexity
from runners.evaluation.scores import Items
from runners.evaluation.stock_tasks import local_task
from runners.evaluation.tasks import TEMPLATES, task_set
from runners.evaluation.texts import load_text, present_texts, text_file
from runners.store.files import cache_root, sha256_of
from runners.store.provenance import code_version
from runners.store.stage_cache import content_key

log = logging.getLogger(__name__)

HERE = Path(__file__).resolve().parent
CODE = [HERE, HERE.parent / "runtime" / "memory.py"]
CODE += sorted(TEMPLATES.glob("*.yaml"))


def evaluation_key(config: Mapping[str, Any], base: Base, documents: Sequence[Document]) -> str:
    """Key of the dense model's scores: weights, precision, text, protocol and its code."""
    settings = dict(config["eval"])
    data_dir = _data_dir(settings)
    files = {} if data_dir is None else _files(settings, data_dir)
    settings["data_dir"] = {name: sha256_of(path) for name, path in sorted(files.items())}
    return content_key(
        "dense scores",
        base.weights_hash,
        config["data"]["name"],
        settings,
        config["seed"],
        digest([document.text for document in documents]),
        code_version(*CODE),
    )


def _files(settings: Mapping[str, Any], data_dir: Path) -> dict[str, Path]:
    """Files of the data folder that these settings read, by their name in it."""
    shots = settings.get("num_fewshot") or {}
    files = {f"text {name}": text_file(name, data_dir) for name in _text_names(settings)}
    for name in settings["tasks"]:
        if name not in GENERATORS:
            found = local_task(name, shots.get(name)).files(data_dir)
            files |= {f"{name} {split}": path for split, path in found.items()}
    return {name: path for name, path in files.items() if path.is_file()}


def evaluate(
    config: Mapping[str, Any],
    base: Base,
    documents: Sequence[Document],
    method: Method | None = None,
    samples_dir: Path | None = None,
) -> dict[str, Any]:
    """Every figure of a record that evaluation measures.

    Args:
        documents: test split.
        method: None for the dense model.
        samples_dir: where lm-eval's full logs go if `eval.log_samples` is set.

    Returns:
        `perplexity`, `accuracy`, `sparsity_realised`, `flops_ratio`, `kv_bytes_ratio` and
        `realised` (by unit kind and layer), the last four on the perplexity text; `items` by task
        or text (`Items`).
    """
    settings, model = config["eval"], base.model
    scope = contextlib.nullcontext() if method is None else routed(model, method, config["mode"])
    with scope:
        name = config["data"]["name"]
        measured = {
            name: perplexity(
                model, base.tokenizer, documents, seed=config["seed"], **settings["perplexity"]
            )
        }
        usage = _usage(model)
        for text, entry in _texts(config, base):
            measured[text] = entry | _realised_on(_usage(model))
        items = {text: _items(entry).to_dict() for text, entry in measured.items()}
        accuracy: dict[str, Any] = {}
        for task, scores in _tasks(config, base, documents, samples_dir):
            entry = scores.entry | _realised_on(_usage(model))
            (measured if scores.measure == "perplexity" else accuracy)[task] = entry
            items[task] = scores.items.to_dict()
    return {
        "perplexity": measured,
        "accuracy": accuracy,
        "items": items,
        "sparsity_realised": usage.sparsity() if usage else 0.0,
        "flops_ratio": flops_ratio(method, usage) if usage and method else 1.0,
        "kv_bytes_ratio": kv_bytes_ratio(method, usage) if usage and method else 1.0,
        "realised": _realised(usage),
    }


def _texts(config: Mapping[str, Any], base: Base) -> Iterator[tuple[str, dict[str, Any]]]:
    """Token perplexity of each text, then of one text at growing context."""
    settings = config["eval"]
    data_dir, sizes = _data_dir(settings), settings["token_perplexity"]
    for name in present_texts(settings["texts"], data_dir):
        yield name, _joined(base, load_text(name, data_dir), config["seed"], sizes)
    long = settings["long_context"]
    if not long or not present_texts([long["text"]], data_dir):
        return
    text = load_text(long["text"], data_dir)
    limit = getattr(base.model.config, "max_position_embeddings", None)
    for context in long["contexts"]:
        if limit is not None and context > limit:
            log.warning("no perplexity at context %d: the model reads %d tokens", context, limit)
            continue
        own = {**sizes, "context": context, "stride": long["stride"], "tokens": long["tokens"]}
        own["batch_size"] = max(1, sizes["batch_size"] * sizes["context"] // context)
        yield f"{long['text']}_context{context}", _joined(base, text, config["seed"], own)


def _joined(
    base: Base, text: Sequence[Document], seed: int, sizes: Mapping[str, Any]
) -> dict[str, Any]:
    stated = {"context": sizes["context"], "stride": sizes["stride"]}
    return joined_perplexity(base.model, base.tokenizer, text, seed=seed, **sizes) | stated


def _tasks(
    config: Mapping[str, Any],
    base: Base,
    documents: Sequence[Document],
    samples_dir: Path | None,
) -> Iterator[tuple[str, Any]]:
    settings = config["eval"]
    if not settings["tasks"]:
        return
    from runners.evaluation.harness import HarnessModel

    harness = HarnessModel(
        base.model,
        base.tokenizer,
        batch_size=settings["batch_size"],
        share_contexts=settings["share_contexts"],
    )
    chosen = task_set(settings, documents, config["seed"], cache_root(config["cache_dir"]))
    for task in chosen.names:
        log_to = samples_dir / f"{task}.jsonl" if samples_dir and settings["log_samples"] else None
        yield task, chosen.run(harness, task, log_to)


def _items(entry: dict[str, Any]) -> Items:
    """Take the documents out of a perplexity's entry, so that the record stays small."""
    found = entry.pop("per_document")
    return Items(
        "perplexity",
        "nll",
        [document["name"] for document in found],
        [document["nll"] for document in found],
        [float(document["tokens"]) for document in found],
    )


def _data_dir(settings: Mapping[str, Any]) -> Path | None:
    chosen = settings.get("data_dir")
    return Path(chosen).expanduser().resolve() if chosen else None


def _text_names(settings: Mapping[str, Any]) -> list[str]:
    long = settings["long_context"]
    return [*settings["texts"], *([long["text"]] if long else [])]


def _realised_on(usage: Usage | None) -> dict[str, float]:
    return {"sparsity_realised": usage.sparsity() if usage else 0.0}


def _usage(model: PreTrainedModel) -> Usage | None:
    """What was executed since the last call; None for the dense model."""
    routing = getattr(model, "routing", None)
    if routing is None:
        return None
    usage = routing.counters.read()
    routing.reset_counters()
    return usage


def _realised(usage: Usage | None) -> dict[str, Any]:
    if usage is None:
        return {"test": 0.0, "attention": 0.0, "mlp": 0.0, "per_layer": []}
    return {
        "test": usage.sparsity(),
        "attention": usage.sparsity("attention"),
        "mlp": usage.sparsity("mlp"),
        "per_layer": usage.per_layer(),
    }
