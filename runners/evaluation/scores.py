"""Turn lm-eval's results into the figures of a record, with their spread, and those of each item.

Without torch, so that checks start in a moment.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from scipy.special import stdtrit

from runners.errors import UserError

METRICS = ("acc_norm,none", "acc,none", "exact_match,strict-match", "exact_match,none")
"""The first of these that a task reports is its accuracy; built-in tasks report `acc`."""
ROLLING = "word_perplexity"


@dataclass
class Items:
    """One figure of each item of a task or each document of a text."""

    measure: Literal["accuracy", "perplexity"]
    metric: str
    """`acc`, `acc_norm`, ...; `nll` (nats, summed over the document) for a perplexity."""
    keys: list[str]
    """What tells an item from others, for pairing: task and hash of the item, or a name."""
    values: list[float]
    weights: list[float]
    """Words or tokens that a document's nll is over; 1 for items."""
    margins: list[float] = field(default_factory=list)
    """`choice_margin` of each item; none for other tasks."""


@dataclass
class TaskScores:
    """A task's entry of the record, and its items."""

    measure: Literal["accuracy", "perplexity"]
    entry: dict[str, Any]
    items: Items


def scores_of(name: str, done: Mapping[str, Any], *, built_in: bool = False) -> TaskScores:
    """Figures of one task, group or tag of a finished `simple_evaluate`.

    Raises:
        UserError: a task that reports no number.
    """
    tasks = [task for task in done["samples"] if done["samples"][task]]
    if any(f"{ROLLING},none" in done["results"].get(task, {}) for task in tasks):
        return _rolling(done["results"][tasks[0]], done["samples"][tasks[0]])
    results = done["results"].get(name) or {}
    if not _numbers(results) and tasks:
        results = done["results"][tasks[0]] if len(tasks) == 1 else _mean_results(done, tasks)
    order = METRICS[1:] if built_in else METRICS
    named = next((metric for metric in order if metric in results), None)
    metric = named or next(iter(_numbers(results)), None)
    if metric is None:
        raise UserError(f"task {name} reports no number")
    short, _, chosen_filter = metric.partition(",")
    items = _items(done, tasks, short, chosen_filter)
    value = float(results[metric])
    stderr = results.get(f"{short}_stderr,{chosen_filter}")
    if not isinstance(stderr, (int, float)) or math.isnan(stderr):
        stderr = _stderr(value, items.values)
    shots = {done["n-shot"].get(task) for task in tasks}
    entry = {
        "value": value,
        "stderr": stderr,
        "n": len(items.values),
        "metric": short,
        "metrics": {key: float(results[key]) for key in _numbers(results)},
        "shots": shots.pop() if len(shots) == 1 else None,
    }
    if items.margins:
        mean = float(np.mean(items.margins))
        entry |= {"margin": mean, "margin_stderr": _stderr(mean, items.margins)}
    return TaskScores("accuracy", entry, items)


def _numbers(results: Mapping[str, Any]) -> list[str]:
    """Names of the reported figures, `metric,filter`, without their standard errors."""
    return [
        key
        for key, value in results.items()
        if "," in key and "_stderr" not in key and isinstance(value, (int, float))
    ]


def _mean_results(done: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, float]:
    """Mean over items of a tag's tasks, for the figures that all of them report."""
    counts = {task: len({s["doc_id"] for s in done["samples"][task]}) for task in tasks}
    shared = set.intersection(*(set(_numbers(done["results"][task])) for task in tasks))
    total = sum(counts.values())
    return {
        key: sum(done["results"][task][key] * counts[task] for task in tasks) / total
        for key in sorted(shared)
    }


def _items(done: Mapping[str, Any], tasks: Sequence[str], metric: str, filter_name: str) -> Items:
    items, margins = Items("accuracy", metric, [], [], []), list[float | None]()
    for task in tasks:
        for sample in done["samples"][task]:
            value = sample.get(metric)
            if sample["filter"] == filter_name and isinstance(value, (bool, int, float)):
                items.keys.append(f"{task}/{sample['doc_id']}/{sample['doc_hash'][:8]}")
                items.values.append(float(value))
                items.weights.append(1.0)
                margins.append(choice_margin(sample))
    known = [margin for margin in margins if margin is not None]
    items.margins = known if len(known) == len(margins) else []
    return items


def choice_margin(sample: Mapping[str, Any]) -> float | None:
    """Subtract the best other choice's log-likelihood from the right one's, nats.

    Above 0 where the choice is right. It moves before the choice does, so that the same items tell
    more of a small loss; unlike the right one's alone, it does not rise with all choices.

    Args:
        sample: of lm-eval's log: `target` is the right one's place, `filtered_resps` has
            (log-likelihood, whether greedy) of each choice.

    Returns:
        None of an item that is no choice, or whose answers are of more than its choices.
    """
    right, answers = sample.get("target"), sample["filtered_resps"]
    pairs = all(isinstance(a, (tuple, list)) and len(a) == 2 for a in answers)
    if not pairs or not isinstance(right, int) or not 0 <= right < len(answers) > 1:
        return None
    if "acc_mutual_info" in sample:  # each choice a second time, without its context
        return None
    scores = [float(score) for score, _ in answers]
    return scores.pop(right) - max(scores)


def _stderr(value: float, values: Sequence[float]) -> float | None:
    """Of the mean over items; None where the task's figure is not that mean."""
    if len(values) < 2 or not math.isclose(float(np.mean(values)), value, abs_tol=1e-6):
        return None
    return float(np.std(values, ddof=1) / len(values) ** 0.5)


def _rolling(results: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> TaskScores:
    """Word perplexity with its interval over documents; byte figures beside it."""
    pairs = [sample[ROLLING] for sample in samples]
    nll = np.array([-log_likelihood for log_likelihood, _ in pairs])
    words = np.array([count for _, count in pairs])
    low, high = perplexity_interval(nll, words)
    entry = {
        "value": float(results[f"{ROLLING},none"]),
        "low": low,
        "high": high,
        "metric": ROLLING,
        "words": int(words.sum()),
        "documents": len(pairs),
        **{key.partition(",")[0]: float(results[key]) for key in _numbers(results)},
    }
    keys = [f"{sample['doc_id']}/{sample['doc_hash'][:8]}" for sample in samples]
    items = Items("perplexity", "nll", keys, nll.tolist(), [float(count) for count in words])
    return TaskScores("perplexity", entry, items)


def perplexity_interval(nll: np.ndarray, tokens: np.ndarray) -> tuple[float | None, float | None]:
    """Give the 95 % interval over documents: Student's, of the loss, by the jackknife.

    That of one perplexity alone; two of the same documents are compared by their ratio.

    Args:
        nll: sum of each document, nats.
        tokens: scored tokens of each document, all positive.

    Returns:
        low and high; None of one document, which has no spread.
    """
    count, whole = len(nll), tokens.sum()
    mean = nll.sum() / whole
    if count < 2:
        return None, None
    others = (nll.sum() - nll) / (whole - tokens)
    error = math.sqrt((count - 1) / count * float(((others - mean) ** 2).sum()))
    half = float(stdtrit(count - 1, 0.975)) * error
    return math.exp(mean - half), math.exp(mean + half)
