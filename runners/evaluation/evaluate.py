"""Measure perplexity and tasks of the dense or the routed model, with what each realised."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from methods.base import Method
from methods.engine.decoder.placement import input_device
from methods.engine.measure.counters import Usage
from methods.engine.measure.flops import flops_ratio, kv_bytes_ratio
from methods.engine.routed import routed
from runners.base_model.load import Base
from runners.corpus.source import Document, digest
from runners.evaluation.builtin_tasks import TEMPLATES
from runners.evaluation.perplexity import perplexity
from runners.evaluation.scores import Items
from runners.evaluation.tasks import TaskSet, local_task_files
from runners.evaluation.texts import load_text, present_texts
from runners.point_config import EvalConfig, WindowConfig
from runners.runtime.progress import Bar
from runners.store.files import content_hash
from runners.store.provenance import code_version
from runners.store.stage_cache import content_key

log = logging.getLogger(__name__)

HERE = Path(__file__).resolve().parent
CODE = [HERE, HERE.parent / "runtime" / "memory.py", *sorted(TEMPLATES.glob("*.yaml"))]
LIBRARIES = ("lm_eval", "transformers", "torch")
"""Another version of these may give other scores."""


def evaluation_key(
    settings: EvalConfig,
    base: Base,
    documents: Sequence[Document],
    *,
    data: str | None,
    seed: int,
    cache_dir: Path,
) -> str:
    """Name the dense model's scores: weights, precision, text, protocol, code, libraries, device.

    Args:
        data: name of the text, under which the record has its perplexity.
    """
    files = sorted(local_task_files(settings).items())
    return content_key(
        "dense scores",
        base.weights_hash,
        data,
        {**vars(settings), "data_dir": {name: content_hash(f, cache_dir) for name, f in files}},
        seed,
        digest([document.text for document in documents]),
        code_version(*CODE),
        [metadata.version(name) for name in LIBRARIES],
        input_device(base.model).type,
    )


def evaluate(
    settings: EvalConfig,
    base: Base,
    documents: Sequence[Document],
    *,
    data: str | None,
    seed: int,
    cache_dir: Path,
    method: Method | None = None,
    mode: str = "gathered",
    samples_dir: Path | None = None,
) -> dict[str, Any]:
    """Measure every figure of a record that evaluation gives.

    Args:
        documents: test split.
        data: its name.
        cache_dir: files of the tasks go there.
        method: None for the dense model.
        samples_dir: where lm-eval's full logs go if `eval.log_samples` is set.

    Returns:
        `perplexity`, `accuracy`, `sparsity_realised`, `flops_ratio`, `kv_bytes_ratio` and
        `realised` (by unit kind and layer), the last four on the perplexity text; `items` by task
        or text (`Items`).
    """
    model, name = base.model, str(data)
    figures: dict[str, dict[str, Any]] = {"perplexity": {}, "accuracy": {}, "items": {}}
    scope = contextlib.nullcontext() if method is None else routed(model, method, mode)  # type: ignore[arg-type]
    what, began = "dense" if method is None else "routed", time.perf_counter()
    with Bar(desc=f"evaluating the {what} model"), scope:
        own = settings.perplexity
        kept, tokens = documents[: own.documents_limit], own.tokens_per_document
        how: dict[str, Any] = {"most": own.windows_per_document, "joined": False}
        with Bar(desc=name):
            entry, items = _perplexity(base, kept, own, tokens, **how)
        figures["perplexity"][name], figures["items"][name] = entry, vars(items)
        usage = _usage(model)
        for text, (entry, items) in _texts(settings, base):
            figures["perplexity"][text] = entry | _realised_on(_usage(model))
            figures["items"][text] = vars(items)
        for task, scores in _tasks(settings, base, documents, seed, cache_dir, samples_dir):
            figures[scores.measure][task] = scores.entry | _realised_on(_usage(model))
            figures["items"][task] = vars(scores.items)
    log.info("evaluated the %s model: %.1f s", what, time.perf_counter() - began)
    return {
        **figures,
        "sparsity_realised": usage.sparsity() if usage else 0.0,
        "flops_ratio": flops_ratio(method, usage) if usage and method else 1.0,
        "kv_bytes_ratio": kv_bytes_ratio(method, usage) if usage and method else 1.0,
        "realised": {
            "test": usage.sparsity() if usage else 0.0,
            "attention": usage.sparsity("attention") if usage else 0.0,
            "mlp": usage.sparsity("mlp") if usage else 0.0,
            "per_layer": usage.per_layer() if usage else [],
        },
    }


def _texts(settings: EvalConfig, base: Base) -> Iterator[tuple[str, tuple[dict[str, Any], Items]]]:
    """Token perplexity of each text, then of one text at growing context."""
    folder, sizes, long = settings.data_folder, settings.token_perplexity, settings.long_context
    for name in present_texts(settings.texts, folder):
        with Bar(desc=name):
            found = _perplexity(base, load_text(name, folder), sizes, sizes.tokens)
        yield name, found
    if long is None or not present_texts([long.text], folder):
        return
    text = load_text(long.text, folder)
    limit = getattr(base.model.config, "max_position_embeddings", None)
    for context in long.contexts:
        if limit is not None and context > limit:
            log.warning("no perplexity at context %d: the model reads %d tokens", context, limit)
            continue
        batch = max(1, sizes.batch_size * sizes.context // context)
        own = replace(sizes, context=context, stride=long.stride, batch_size=batch)
        name = f"{long.text}_context{context}"
        with Bar(desc=name):
            found = _perplexity(base, text, own, long.tokens)
        yield name, found


def _perplexity(
    base: Base,
    documents: Sequence[Document],
    sizes: WindowConfig,
    tokens: int | None,
    *,
    most: int | None = None,
    joined: bool = True,
) -> tuple[dict[str, Any], Items]:
    """An entry of the record, and its documents apart, so that the record stays small."""
    how: dict[str, Any] = {"tokens": tokens, "most": most, "joined": joined}
    entry = perplexity(base.model, base.tokenizer, documents, sizes, **how)
    found = entry.pop("per_document")
    names, nlls, weights = ([part[key] for part in found] for key in ("name", "nll", "tokens"))
    stated = {"context": sizes.context, "stride": sizes.stride} if joined else {}
    return entry | stated, Items("perplexity", "nll", names, nlls, [float(n) for n in weights])


def _tasks(
    settings: EvalConfig,
    base: Base,
    documents: Sequence[Document],
    seed: int,
    cache_dir: Path,
    samples_dir: Path | None,
) -> Iterator[tuple[str, Any]]:
    if not settings.tasks:
        return
    from runners.evaluation.harness import HarnessModel

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    harness = HarnessModel(
        base.model,
        base.tokenizer,
        batch_size=settings.batch_size,
        share_contexts=settings.share_contexts,
    )
    chosen = TaskSet(settings, documents, seed, cache_dir)
    for task in settings.tasks:
        log_to = samples_dir / f"{task}.jsonl" if samples_dir and settings.log_samples else None
        with Bar(desc=task):
            found = chosen.run(harness, task, log_to)
        yield task, found


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
