"""Times lm-eval tasks: its stock `hf` class, ours on the dense model, ours on a routed one.

    python benchmarks/harness.py saved=results/<fingerprint>/routed tasks=piqa,arc_easy \
        data_dir=<folder> limit=50 batch_size=8 repeats=5

`saved` is a folder that runners/train.py or a sweep wrote. The three take turns in one process;
the ratios are medians over the turns. `share_contexts=false` gives ours the stock batches. Ends
with an error if a score of the dense model differs from the stock one (a perplexity by more than a
millionth: ours is summed in float64).
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # run the code of this clone, whichever clone's environment it is
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import math
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import lm_eval
import yaml
from lm_eval.models.huggingface import HFLM

from methods.engine.checkpoint import from_pretrained
from methods.engine.routed import routed
from runners.base_model.load import Base
from runners.errors import UserError
from runners.evaluation.harness import HarnessModel
from runners.evaluation.tasks import TaskSet
from runners.options import parse_section
from runners.point_config import EvalConfig
from runners.routed_lm import RoutedOptions, base_of
from runners.timing.stopwatch import interleaved, ratio, timed

Scores = dict[str, dict[str, float]]


def main() -> None:
    """Time each task by itself and print a line for it."""
    words = dict(word.split("=", 1) for word in sys.argv[1:])
    if "saved" not in words or "tasks" not in words:
        raise UserError("give saved=<folder of a saved routed model> tasks=<names>")
    base = base_of(RoutedOptions(words["saved"]))
    quick = Path(__file__).resolve().parents[1] / "conf" / "eval" / "quick.yaml"
    own = {"tasks": words["tasks"].split(","), "limit": int(words.get("limit", 50))}
    own["data_dir"] = words.get("data_dir")
    settings = parse_section(EvalConfig, {**yaml.safe_load(quick.read_text()), **own})
    with tempfile.TemporaryDirectory() as cache:
        chosen = TaskSet(settings, [], 0, Path(cache))
        for task in settings.tasks:
            _compare(base, chosen, task, words)


def _compare(base: Base, chosen: TaskSet, task: str, words: dict[str, str]) -> None:
    share = {"true": True, "false": False}.get(words.get("share_contexts", ""))
    size = int(words.get("batch_size", 8))
    options = {"tokenizer": base.tokenizer, "batch_size": size}
    ours: Any = HarnessModel(base.model, share_contexts=share, **options)  # type: ignore[arg-type]
    stock: Any = HFLM(pretrained=base.model, **options)  # type: ignore[arg-type]
    method = from_pretrained(words["saved"], base.model)
    found: dict[str, Scores] = {}

    def run(name: str, harness: Any) -> float:
        work = partial(_evaluate, harness, chosen, task)
        return timed(lambda: found.__setitem__(name, work()), base.model.device)

    def run_routed() -> float:
        with routed(base.model, method, "gathered"):
            return run("routed", ours)

    runs: list[Callable[[], float]] = [
        lambda: run("stock", stock),
        lambda: run("dense", ours),
        run_routed,
    ]
    times = interleaved(
        runs,
        device=base.model.device,
        warmup=1,
        repeats=int(words.get("repeats", 5)),
        label=task,
    )
    if not _equal(found["stock"], found["dense"]):
        raise UserError(f"{task}: stock {found['stock']}, ours on the dense model {found['dense']}")
    hf, dense, sparse = times
    sys.stdout.write(
        f"{task}: stock {hf.median:.2f} s; ours, dense, {ratio(hf, dense)['median']:.3f} times its "
        f"throughput; routed {ratio(hf, sparse)['median']:.3f}, over our dense "
        f"{ratio(dense, sparse)['median']:.3f}; dense scores equal the stock ones: "
        f"{found['stock']}\n"
    )


def _evaluate(harness: Any, chosen: TaskSet, task: str) -> dict[str, float]:
    done = lm_eval.simple_evaluate(
        model=harness,
        tasks=[task],
        limit=chosen.settings.limit,
        task_manager=chosen.manager,
        bootstrap_iters=0,
    )
    assert done is not None
    metrics = done["results"][task]
    return {
        name: value
        for name, value in metrics.items()
        if isinstance(value, float) and "stderr" not in name
    }


def _equal(stock: dict[str, float], ours: dict[str, float]) -> bool:
    if not stock or stock.keys() != ours.keys():
        return False
    tolerances = {name: 0.0 if name.startswith("acc") else 1e-6 for name in stock}
    return all(math.isclose(stock[n], ours[n], rel_tol=tolerances[n]) for n in stock)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
