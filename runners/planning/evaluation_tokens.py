"""How many tokens one evaluation reads, without its data where that is not here."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from runners.corpus.source import stream_documents

BYTES_PER_TOKEN = {"tiny": 1.0, "shape": 1.0}
"""By model source; other tokenizers make a token of about four bytes of English."""


def evaluation_tokens(
    config: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[float, list[str]]:
    """Tokens of the perplexity texts and tasks, and the names of those that are not known.

    Args:
        options: the group `plan`: tokens of texts and tasks.
    """
    settings = config["eval"]
    total = _document_tokens(config, options)
    tables = {"texts": options["texts"], "tasks": options["tasks"]}
    unknown = [
        name for group, table in tables.items() for name in settings[group] if name not in table
    ]
    limit = settings["token_perplexity"]["tokens"]
    total += sum(_least(tables["texts"].get(name, 0), limit) for name in settings["texts"])
    if settings["long_context"]:
        long = settings["long_context"]
        total += sum(long["tokens"] * context / long["stride"] for context in long["contexts"])
    shots = settings["num_fewshot"] or {}
    for name in settings["tasks"]:
        if name in tables["tasks"]:
            task = tables["tasks"][name]
            items = _least(task["items"], settings["limit"])
            total += items * (task["tokens"] + shots.get(name, 0) * task["shot"])
    return total, unknown


def _document_tokens(config: Mapping[str, Any], options: Mapping[str, Any]) -> float:
    """Of the data's own test split, `eval.perplexity`; a local one is measured."""
    data, settings = config["data"], config["eval"]["perplexity"]
    most, limit = settings["tokens_per_document"], settings["documents_limit"]
    if data["source"] == "hub" and data["dir"] is None:
        documents = _least(_least(options["documents"], data["documents_limit"]), limit)
        if limit is not None:
            documents = limit
        return float(documents * min(options["document_tokens"], most))
    known = stream_documents(split="test", **data)
    size = BYTES_PER_TOKEN.get(config["model"]["source"], 4.0)
    lengths = (len(document.text) / size for document in itertools.islice(known, limit))
    return float(sum(min(length, most) for length in lengths))


def _least(number: float, limit: float | None) -> float:
    return number if limit is None else min(number, limit)
