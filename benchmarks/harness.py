"""Time lm-eval tasks: its stock `hf` class, ours on the dense model, ours on a routed one.

python benchmarks/harness.py results/<fingerprint>/routed --tasks piqa,arc_easy --data-dir <folder>

The three take turns in one process; the ratios are medians over the turns. Ends with an error if a
score of the dense model differs from the stock one (a perplexity by more than a millionth: ours is
summed in float64).
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # run the code of this clone, whichever clone's environment it is
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import math
import tempfile
from functools import partial
from typing import Any

import lm_eval
import yaml
from lm_eval.models.huggingface import HFLM

from methods.engine.routed import routed
from runners.base_model.saved import open_saved
from runners.errors import UserError
from runners.evaluation.harness import HarnessModel
from runners.evaluation.tasks import TaskSet
from runners.options import parse_section
from runners.point_config import EvalConfig
from runners.timing.stopwatch import interleaved, ratio, timed


def main(words: list[str] | None = None) -> None:
    """Time each task by itself and print a line for it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("saved", help="a folder that runners/train.py or a sweep wrote")
    parser.add_argument("--tasks", required=True, help="names, between commas")
    parser.add_argument("--data-dir", help="local copies of the tasks")
    parser.add_argument("--limit", type=int, default=50, help="documents of a task")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5, help="timed turns")
    parser.add_argument("--stock-batches", action="store_true", help="share no contexts")
    asked = parser.parse_args(words)
    quick = yaml.safe_load((ROOT / "conf" / "eval" / "quick.yaml").read_text())
    own = {"tasks": asked.tasks.split(","), "limit": asked.limit, "data_dir": asked.data_dir}
    settings = parse_section(EvalConfig, {**quick, **own})
    opened = open_saved(asked.saved)
    base, method = opened.base, opened.method
    options: Any = {"tokenizer": base.tokenizer, "batch_size": asked.batch_size}
    share = False if asked.stock_batches else None
    ours: Any = HarnessModel(base.model, share_contexts=share, **options)
    stock: Any = HFLM(pretrained=base.model, **options)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as cache:
        chosen = TaskSet(settings, [], 0, Path(cache))
        for task in settings.tasks:
            _compare(task, chosen, stock, ours, method, asked.repeats)


def _compare(task: str, chosen: TaskSet, stock: Any, ours: Any, method: Any, turns: int) -> None:
    device, found = ours.model.device, {}

    def run(name: str, harness: Any) -> float:
        scores = partial(_evaluate, harness, chosen, task)
        return timed(lambda: found.__setitem__(name, scores()), device)

    def run_routed() -> float:
        with routed(ours.model, method, "gathered"):
            return run("routed", ours)

    runs = [partial(run, "stock", stock), partial(run, "dense", ours), run_routed]
    hf, dense, sparse = interleaved(runs, device=device, warmup=1, repeats=turns, label=task)
    if not _equal(found["stock"], found["dense"]):
        raise UserError(f"{task}: stock {found['stock']}, ours on the dense model {found['dense']}")
    print(
        f"{task}: stock {hf.median:.2f} s; ours, dense, {ratio(hf, dense)['median']:.3f} times its "
        f"throughput; routed {ratio(hf, sparse)['median']:.3f}, over our dense "
        f"{ratio(dense, sparse)['median']:.3f}; dense scores equal the stock ones: {found['stock']}"
    )


def _evaluate(harness: Any, chosen: TaskSet, task: str) -> dict[str, float]:
    done: Any = lm_eval.simple_evaluate(
        model=harness,
        tasks=[task],
        limit=chosen.settings.limit,
        task_manager=chosen.manager,
        bootstrap_iters=0,
    )
    metrics = done["results"][task].items()
    return {n: value for n, value in metrics if isinstance(value, float) and "stderr" not in n}


def _equal(stock: dict[str, float], ours: dict[str, float]) -> bool:
    tolerances = {name: 0.0 if name.startswith("acc") else 1e-6 for name in stock}
    same = (math.isclose(stock[n], ours[n], rel_tol=tolerances[n]) for n in stock if n in ours)
    return bool(stock) and stock.keys() == ours.keys() and all(same)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
