"""lm-eval tasks on a dense or routed model, the built-in ones included."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from runners.corpus import Document
from runners.errors import UserError
from runners.store import write_bytes_atomic
from runners.task_items import CHOICES_OF, GENERATORS, items_folder, write_items

log = logging.getLogger(__name__)

TEMPLATES = Path(__file__).resolve().parents[1] / "conf" / "eval" / "tasks"
METRICS = ("acc_norm,none", "acc,none", "exact_match,strict-match", "exact_match,none")
"""The first of these that a task reports is its accuracy; built-in tasks report `acc`."""


def check_tasks(names: Sequence[str]) -> None:
    """Refuse unknown tasks; lm-eval's index is read only if a name is not built in.

    Raises:
        UserError: a task that neither routebench nor lm-eval knows.
    """
    foreign = [name for name in names if name not in GENERATORS]
    if not foreign:
        return
    known = _harness_names()
    for name in foreign:
        if name not in known:
            raise UserError(
                f"unknown task {name!r}; built in: {', '.join(sorted(GENERATORS))}, "
                "or any task that `lm_eval ls tasks` lists"
            )


def _harness_names() -> set[str]:
    from lm_eval.tasks import TaskManager

    return set(TaskManager().all_tasks)


def run_tasks(
    model: Any,
    tokenizer: Any,
    *,
    tasks: Sequence[str],
    limit: int | None,
    batch_size: int,
    num_fewshot: int | None,
    seed: int,
    cache_dir: Path,
    documents: Sequence[Document],
) -> dict[str, dict[str, Any]]:
    """Evaluate with `lm_eval.simple_evaluate`.

    Args:
        model: a causal LM, routed or not.
        limit: first items only; None for all.
        batch_size: rows of a forward pass.
        cache_dir: generated items and task files go to `<cache_dir>/tasks`.
        documents: test text, for tasks that are made from it.

    Returns:
        `{task: {value, stderr, n, chance}}`; chance is None where lm-eval's task has no fixed
        number of choices.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    from runners.harness import HarnessModel

    own = [name for name in tasks if name in GENERATORS]
    folder = prepare_tasks(own, documents, seed, cache_dir) if own else None
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    done = lm_eval.simple_evaluate(
        model=HarnessModel(model, tokenizer, batch_size=batch_size),
        tasks=list(tasks),
        num_fewshot=num_fewshot,
        limit=limit,
        task_manager=TaskManager(include_path=str(folder) if folder else None),
        bootstrap_iters=0,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
        log_samples=False,
    )
    return {name: _score(name, done) for name in tasks}


def prepare_tasks(
    names: Sequence[str], documents: Sequence[Document], seed: int, cache_dir: Path
) -> Path:
    """Generate items and task YAML of built-in tasks; the same text and seed reuse the files."""
    folder = items_folder(cache_dir / "tasks", documents, seed)
    for name in names:
        items = write_items(name, documents, seed, folder)
        template = yaml.safe_load((TEMPLATES / f"{name}.yaml").read_text())
        template["dataset_kwargs"] = {
            "data_files": {"test": str(items)},
            "cache_dir": str(cache_dir / "datasets"),
        }
        text = yaml.safe_dump(template, sort_keys=False)
        write_bytes_atomic(folder / f"{name}.yaml", text.encode())
    return folder


def _score(name: str, done: dict[str, Any]) -> dict[str, Any]:
    results = done["results"][name]
    order = METRICS[1:] if name in GENERATORS else METRICS
    metric = next((m for m in order if m in results), None)
    if metric is None:
        raise UserError(f"task {name} reports none of {', '.join(METRICS)}")
    left, right = metric.split(",")
    n = done["n-samples"][name]["effective"]
    value, stderr = float(results[metric]), results.get(f"{left}_stderr,{right}")
    if not isinstance(stderr, (int, float)):
        stderr = (value * (1 - value) / max(1, n - 1)) ** 0.5
    choices = CHOICES_OF.get(name)
    return {
        "value": value,
        "stderr": float(stderr),
        "n": int(n),
        "metric": left,
        "chance": 1 / choices if choices else None,
    }
