"""lm-eval tasks on a dense or routed model, the built-in and the local ones included."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from runners.corpus.source import Document
from runners.errors import UserError
from runners.evaluation.builtin_tasks import CHOICES_OF, GENERATORS, items_folder, write_items
from runners.evaluation.scores import TaskScores, scores_of
from runners.evaluation.stock import stock
from runners.evaluation.stock_tasks import task_file
from runners.store.files import write_bytes_atomic

if TYPE_CHECKING:
    from runners.evaluation.harness import HarnessModel

log = logging.getLogger(__name__)

TEMPLATES = Path(__file__).resolve().parents[2] / "conf" / "eval" / "tasks"
FEWSHOT_SEED = 1234
"""lm-eval's own default: the same examples as its command line draws, for every seed of ours."""


def check_tasks(names: Sequence[str]) -> None:
    """Refuse unknown tasks; lm-eval's files are read only if a name is not built in.

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
    return {*stock().tasks, *stock().collections}


@dataclass(frozen=True)
class TaskSet:
    """Tasks of an evaluation with their files in place.

    Args:
        names: built-in or lm-eval tasks, groups or tags.
        num_fewshot: examples in the prompt by task; the task's own number where it is not named.
        limit: first items only; None for all.
        chat_template: put prompts into the tokenizer's chat template.
        manager: lm-eval's index, with our task files before its own.
    """

    names: Sequence[str]
    num_fewshot: Mapping[str, int | None]
    limit: int | None
    chat_template: bool
    manager: Any

    def run(self, harness: HarnessModel, name: str, samples_file: Path | None = None) -> TaskScores:
        """Evaluate one task with `lm_eval.simple_evaluate`.

        Args:
            samples_file: lm-eval's full log (prompts, answers, log-likelihoods), a JSON line each.
        """
        import lm_eval

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        before = (harness.generation.tokens, harness.generation.seconds, harness.oom_halvings)
        done = lm_eval.simple_evaluate(
            model=harness,
            tasks=[name],
            num_fewshot=self.num_fewshot.get(name),
            limit=self.limit,
            task_manager=self.manager,
            bootstrap_iters=0,
            fewshot_random_seed=FEWSHOT_SEED,
            apply_chat_template=self.chat_template,
            log_samples=True,
        )
        assert done is not None
        scores = scores_of(name, dict(done), built_in=name in GENERATORS)
        choices = CHOICES_OF.get(name)
        scores.entry["chance"] = 1 / choices if choices else None
        scores.entry["oom_halvings"] = harness.oom_halvings - before[2]
        tokens = harness.generation.tokens - before[0]
        if tokens:
            seconds = harness.generation.seconds - before[1]
            scores.entry |= {"generated_tokens": tokens, "tokens_per_s": tokens / seconds}
        if samples_file is not None:
            lines = [
                json.dumps(sample, default=str)
                for task in done["samples"].values()
                for sample in task
            ]
            write_bytes_atomic(samples_file, ("\n".join(lines) + "\n").encode())
        return scores


def task_set(
    settings: Mapping[str, Any], documents: Sequence[Document], seed: int, cache_dir: Path
) -> TaskSet:
    """Write the task files that `settings` (a config's `eval`) needs, and index them.

    Args:
        documents: test text, for tasks that are made from it.
        seed: of the built-in tasks' items.
        cache_dir: files go to `<cache_dir>/tasks`.

    Raises:
        UserError: files that `eval.data_dir` lacks; too little text.
    """
    import datasets
    from lm_eval.tasks import TaskManager

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    names = list(settings["tasks"])
    shots = settings.get("num_fewshot") or {}
    chosen = settings.get("data_dir")
    data_dir = Path(chosen).expanduser().resolve() if chosen else None
    folders: list[str | Path] = []
    own = [name for name in names if name in GENERATORS]
    if own:
        folders.append(str(prepare_tasks(own, documents, seed, cache_dir)))
    single = [name for name in names if name in stock().tasks] if len(own) < len(names) else []
    if single:
        identity = json.dumps([single, str(data_dir), dict(shots)], sort_keys=True)
        folder = cache_dir / "tasks" / hashlib.sha256(identity.encode()).hexdigest()[:16]
        for name in single:
            task = task_file(name, data_dir, shots.get(name), cache_dir / "datasets")
            write_bytes_atomic(folder / f"{name}.yaml", yaml.safe_dump(task).encode())
        folders.append(str(folder))
    others = set(names) - set(own) - set(single)
    return TaskSet(
        names=names,
        num_fewshot=shots,
        limit=settings["limit"],
        chat_template=bool(settings.get("chat_template")),
        manager=TaskManager(include_path=folders or None, include_defaults=bool(others)),
    )


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
