"""Perplexity and tasks of the dense or the routed model, with what each realised."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from methods.base import Method
from methods.engine.counters import Usage
from methods.engine.flops import flops_ratio, kv_bytes_ratio
from methods.engine.wrap import routed
from runners.assets import cache_root
from runners.build import Base
from runners.corpus import Document, digest
from runners.perplexity import perplexity
from runners.products import content_key
from runners.provenance import code_version
from runners.tasks import TEMPLATES, run_tasks

HERE = Path(__file__).resolve().parent
CODE = [HERE / f"{name}.py" for name in ("perplexity", "tasks", "task_items", "harness")]
CODE += sorted(TEMPLATES.glob("*.yaml"))


def evaluation_key(config: Mapping[str, Any], base: Base, documents: Sequence[Document]) -> str:
    """Key of the dense model's scores: weights, precision, text, protocol and its code."""
    return content_key(
        "dense scores",
        base.weights_hash,
        config["data"]["name"],
        config["eval"],
        config["seed"],
        digest([document.text for document in documents]),
        code_version(*CODE),
    )


def evaluate(
    config: Mapping[str, Any],
    base: Base,
    documents: Sequence[Document],
    method: Method | None = None,
) -> dict[str, Any]:
    """Every figure of a record that evaluation measures.

    Args:
        documents: test split.
        method: None for the dense model.

    Returns:
        `perplexity`, `accuracy`, `sparsity_realised`, `flops_ratio`, `kv_bytes_ratio` and
        `realised` (by unit kind and layer), the last four on the perplexity text.
    """
    settings, model = config["eval"], base.model
    scope = contextlib.nullcontext() if method is None else routed(model, method, config["mode"])
    with scope:
        entry = perplexity(
            model, base.tokenizer, documents, seed=config["seed"], **settings["perplexity"]
        )
        usage = _usage(model)
        accuracy = {}
        for task in settings["tasks"]:
            scores = run_tasks(
                model,
                base.tokenizer,
                tasks=[task],
                limit=settings["limit"],
                batch_size=settings["batch_size"],
                num_fewshot=(settings.get("num_fewshot") or {}).get(task),
                seed=config["seed"],
                cache_dir=cache_root(config["cache_dir"]),
                documents=documents,
            )
            on_task = _usage(model)
            for name, score in scores.items():
                accuracy[name] = {
                    **score,
                    "sparsity_realised": on_task.sparsity() if on_task else 0.0,
                }
    name = config["data"]["name"]
    return {
        "perplexity": {name: entry},
        "accuracy": accuracy,
        "sparsity_realised": usage.sparsity() if usage else 0.0,
        "flops_ratio": flops_ratio(method, usage) if usage and method else 1.0,
        "kv_bytes_ratio": kv_bytes_ratio(method, usage) if usage and method else 1.0,
        "realised": _realised(usage),
    }


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
