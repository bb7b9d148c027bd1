"""Run lm-eval tasks on a dense or routed model, the built-in and the local ones included."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from runners.corpus.source import Document, digest
from runners.errors import UserError
from runners.evaluation.builtin_tasks import CHOICES_OF, GENERATORS, write_builtin_tasks
from runners.evaluation.scores import TaskScores, scores_of
from runners.evaluation.stock_tasks import stock, stock_task, task_file
from runners.evaluation.texts import text_file
from runners.options import nearest
from runners.point_config import EvalConfig
from runners.store.files import write_bytes_atomic

if TYPE_CHECKING:
    from runners.evaluation.harness import HarnessModel

log = logging.getLogger(__name__)

FEWSHOT_SEED = 1234
"""lm-eval's own default: the same examples as its command line draws, for every seed of ours."""


def check_tasks(names: Sequence[str]) -> None:
    """Refuse unknown tasks; lm-eval's files are read only if a name is not built in.

    Raises:
        UserError: a task that neither routebench nor lm-eval knows.
    """
    foreign = [name for name in names if name not in GENERATORS]
    known = {*stock().tasks, *stock().collections} if foreign else set()
    for name in foreign:
        if name not in known:
            hint = nearest(name, [*GENERATORS, *known])
            raise UserError(
                f"unknown task {name!r}{hint}; built in: {', '.join(sorted(GENERATORS))}, "
                "or any task that `lm_eval ls tasks` lists"
            )


def local_task_files(settings: EvalConfig) -> dict[str, Path]:
    """List the files of `eval.data_dir` that an evaluation reads, by their name in it."""
    folder = settings.data_folder
    if folder is None:
        return {}
    files = {f"text {name}": text_file(name, folder) for name in settings.text_names}
    for name in settings.tasks:
        if name not in GENERATORS:
            found = stock_task(name, settings.num_fewshot.get(name)).files(folder)
            files |= {f"{name} {split}": path for split, path in found.items()}
    return {name: path for name, path in files.items() if path.is_file()}


def task_files(
    names: Sequence[str],
    documents: Sequence[Document],
    *,
    seed: int,
    cache_dir: Path,
    data_dir: Path | None,
    num_fewshot: Mapping[str, int],
) -> dict[str, Path]:
    """Write the lm-eval file of each task that is built in or a single one of lm-eval's.

    Args:
        documents: test text, for tasks that are made from it.
        seed: of the built-in tasks' items.
        data_dir: local copies of lm-eval's; None reads them from the hub.

    Raises:
        UserError: files that the data folder lacks; too little text.
    """
    files: dict[str, Path] = {}
    if own := [name for name in names if name in GENERATORS]:
        folder = write_builtin_tasks(own, documents, seed, cache_dir)
        files |= {name: folder / f"{name}.yaml" for name in own}
    single = [name for name in names if name not in files and name in stock().tasks]
    if single:
        identity = digest([single, str(data_dir), dict(num_fewshot)])
        for name in single:
            task = task_file(name, data_dir, num_fewshot.get(name), cache_dir / "datasets")
            files[name] = cache_dir / "tasks" / identity[:16] / f"{name}.yaml"
            write_bytes_atomic(files[name], yaml.safe_dump(task).encode())
    return files


class TaskSet:
    """The tasks of an evaluation with their files in place and indexed.

    Args:
        documents: test text, for tasks that are made from it.
        seed: of the built-in tasks' items.
        cache_dir: files go to `<cache_dir>/tasks`.

    Raises:
        UserError: files that `eval.data_dir` lacks; too little text.
    """

    def __init__(
        self, settings: EvalConfig, documents: Sequence[Document], seed: int, cache_dir: Path
    ) -> None:
        import datasets
        from lm_eval.tasks import TaskManager

        datasets.disable_progress_bars()  # of making and filtering tables, seconds each
        self.settings = settings
        files = task_files(
            settings.tasks,
            documents,
            seed=seed,
            cache_dir=cache_dir,
            data_dir=settings.data_folder,
            num_fewshot=settings.num_fewshot,
        )
        self.manager = TaskManager(
            include_path=sorted({str(file.parent) for file in files.values()}) or None,
            include_defaults=len(files) < len(set(settings.tasks)),
        )

    def run(self, harness: HarnessModel, name: str, samples_file: Path | None = None) -> TaskScores:
        """Evaluate one task with `lm_eval.simple_evaluate`.

        Args:
            samples_file: for lm-eval's full log (prompts, answers, log-likelihoods), a line each.
        """
        import lm_eval

        tokens, seconds = harness.generated_tokens, harness.generation_s
        halvings = harness.oom_halvings
        done: Any = lm_eval.simple_evaluate(
            model=harness,
            tasks=[name],
            num_fewshot=self.settings.num_fewshot.get(name),
            limit=self.settings.limit,
            task_manager=self.manager,
            bootstrap_iters=0,
            fewshot_random_seed=FEWSHOT_SEED,
            apply_chat_template=self.settings.chat_template,
            log_samples=True,
        )
        scores = scores_of(name, done, built_in=name in GENERATORS)
        scores.entry["chance"] = 1 / CHOICES_OF[name] if name in CHOICES_OF else None
        scores.entry["oom_halvings"] = harness.oom_halvings - halvings
        # sparsity is of the tokens that were read: a shared context counts once, not per choice
        scores.entry["shared_contexts"] = harness.share_contexts
        tokens, seconds = harness.generated_tokens - tokens, harness.generation_s - seconds
        if tokens:
            scores.entry |= {"generated_tokens": tokens, "tokens_per_s": tokens / seconds}
        if samples_file is not None:
            samples = [sample for task in done["samples"].values() for sample in task]
            lines = "".join(f"{json.dumps(sample, default=str)}\n" for sample in samples)
            write_bytes_atomic(samples_file, lines.encode())
        return scores
