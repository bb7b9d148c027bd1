"""Times the report over a store of thousands of points, made here.

python benchmarks/report.py [points=5000] [items=true]

Prints seconds of reading the records, of making the frames, and of the whole report. `items=false`
leaves out the per-item files, which only bands and significance read.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # run the code of this clone, whichever clone's environment it is
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import json
import random
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import pandas as pd
import yaml

from analysis import report
from analysis.cli import Paths
from analysis.frames import Store

METHODS = ("informed", "greedy", "skipgpt", "mod", "d_llm", "hero", "flexidepth", "random")
SEEDS = 5
LAYERS = 30
ITEMS = 100
DOCUMENTS = 22
CONFIG = Path(__file__).resolve().parents[1] / "conf"


def main() -> None:
    """Make the store in a temporary folder, then time."""
    words = dict(word.split("=", 1) for word in sys.argv[1:])
    points = int(words.get("points", 5000))
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results"
        for point in make_points(points):
            write(results, point, items=words.get("items", "true") == "true")
        for name, seconds in timed(results):
            sys.stdout.write(f"{name}: {seconds:.2f} s\n")


def timed(results: Path) -> Iterator[tuple[str, float]]:
    """(what, seconds) of each step."""
    began = time.perf_counter()
    store = Store(results)
    yield f"{len(store.records)} records read", time.perf_counter() - began
    assert all(len(frame) for frame in (store.layers, store.stages, store.averaged))
    yield "read and in frames", time.perf_counter() - began
    began = time.perf_counter()
    report.main(Paths(results, results))
    yield "report.html and all files", time.perf_counter() - began


def make_points(number: int) -> Iterator[dict[str, Any]]:
    """Records that differ in method, seed and target; plausible numbers, drawn from seed 0."""
    draw = random.Random(0)
    for index in range(number):
        method = METHODS[index % len(METHODS)]
        seed = index // len(METHODS) % SEEDS
        step = index // (len(METHODS) * SEEDS)
        sparsity = round(0.9 * (step + 1) / (number / len(METHODS) / SEEDS + 1), 4)
        yield record(f"{index:016x}", method, sparsity, seed, draw)


def record(name: str, method: str, sparsity: float, seed: int, draw: random.Random) -> dict:
    """One record with everything that a sweep's has."""
    value = 20.0 * (1 + 10 * sparsity**2 * draw.uniform(0.8, 1.2))
    right = 0.92 - sparsity * draw.uniform(0.5, 0.7)
    layer_shares = [draw.uniform(0, min(1.0, 2 * sparsity)) for _ in range(LAYERS)]
    stage = {"tokens": 10240, "peak_memory_bytes": 2 * 1024**3, "final_loss": None, "figures": {}}
    return {
        "schema_version": 1,
        "status": "complete",
        "method": method,
        "variant": "",
        "model": "smollm2_135m",
        "data": "sotu",
        "seed": seed,
        "sparsity_target": sparsity,
        "sparsity_realised": sparsity + draw.uniform(-0.01, 0.01),
        "flops_ratio": 1 - 0.8 * sparsity,
        "perplexity": {
            "sotu": {
                "value": value,
                "low": value * 0.95,
                "high": value * 1.05,
                "dense": 20.0,
                "documents": DOCUMENTS,
                "tokens": 11264,
            }
        },
        "accuracy": {
            "continuation_choice": {
                "value": right,
                "stderr": 0.04,
                "n": ITEMS,
                "dense": 0.92,
                "dense_stderr": 0.03,
                "chance": 0.25,
            }
        },
        "realised": {
            "test": sparsity,
            "per_layer": [
                {"layer": i, "attention": s, "mlp": s / 2} for i, s in enumerate(layer_shares)
            ],
        },
        "stages": [
            {"name": n, "seconds": draw.uniform(1, 100), "steps": 40, "cached": False, **stage}
            for n in ("forecasters", "routers", "calibrate")
        ],
        "options": {"sparsity": sparsity},
        "identity": {
            "fingerprint": name,
            "budget": "quick",
            "device": "a processor",
            "git": {"commit": "0" * 40, "dirty": False},
            "packages": {"torch": "2.13.0"},
        },
    }


def write(results: Path, point: dict[str, Any], *, items: bool) -> None:
    """The folder of one point: record, configuration and items."""
    folder = results / point["identity"]["fingerprint"]
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(point, indent=2))
    groups = {"budget": "quick", "eval": "quick", "data": "sotu", "speed": "quick"}
    config = {
        key: yaml.safe_load((CONFIG / key / f"{name}.yaml").read_text())
        for key, name in groups.items()
    }
    config |= {"method": {"name": point["method"]}, "model": {"name": point["model"]}}
    config |= {"sparsity": point["sparsity_target"], "seed": point["seed"]}
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    if items:
        _items(point).to_parquet(folder / "items.parquet", index=False)


def _items(point: dict[str, Any]) -> pd.DataFrame:
    draw = random.Random(point["identity"]["fingerprint"])
    right = point["accuracy"]["continuation_choice"]["value"]
    task = {"measure": "accuracy", "name": "continuation_choice", "metric": "acc", "weight": 1.0}
    text = {"measure": "perplexity", "name": "sotu", "metric": "nll", "weight": 512.0}
    rows = [
        {**task, "item": f"i{i}", "value": float(draw.random() < right), "dense": 1.0}
        for i in range(ITEMS)
    ]
    rows += [
        {**text, "item": f"d{i}", "value": 512 * draw.uniform(3, 4), "dense": 512 * 3.0}
        for i in range(DOCUMENTS)
    ]
    return pd.DataFrame(rows)


if __name__ == "__main__":
    main()
