"""Time a sweep of two single-thread points, one after the other and side by side.

python benchmarks/parallel.py --repeats 3 model=smollm2_135m

Every turn starts with empty results and without any cached stage. The two points share nothing
(two methods). Overrides (key=value) go to both sweeps.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # run the code of this clone, whichever clone's environment it is
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import os
import statistics
import subprocess
import tempfile
import time

from runners.store.files import cache_root

POINTS = ("method=skipgpt,d_llm", "sparsity=0.4", "tracking=off", "-m")
SHARED = ("models", "datasets")
"""Folders of the cache that hold downloads, which no turn should pay for."""
WORKERS = {"joblib": "hydra.launcher.n_jobs=2", "ray": "hydra.launcher.workers=2"}


def main(words: list[str] | None = None) -> None:
    """Print both times and their ratio for each turn, then the median of the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("overrides", nargs="*", help="of both sweeps, key=value")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--launcher", choices=WORKERS, default="joblib")
    asked = parser.parse_args(words)
    beside = [f"hydra/launcher={asked.launcher}", WORKERS[asked.launcher]]
    ratios = []
    for turn in range(asked.repeats):
        serial, parallel = _seconds(asked.overrides), _seconds([*asked.overrides, *beside])
        ratios.append(serial / parallel)
        print(f"{turn}: {serial:.1f} s, {parallel:.1f} s, {ratios[-1]:.2f}", flush=True)
    print(f"{asked.launcher}: {statistics.median(ratios):.2f} times as fast as serial")


def _seconds(overrides: list[str]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        cache.mkdir()
        for name in SHARED:
            if (cache_root() / name).is_dir():
                (cache / name).symlink_to(cache_root() / name)
        places = [f"results_dir={folder}/results", f"cache_dir={cache}"]
        command = [sys.executable, str(ROOT / "runners" / "sweep.py"), *POINTS, *places, *overrides]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        began = time.perf_counter()
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        seconds = time.perf_counter() - began
    if done.returncode:
        sys.exit(f"error: the sweep ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    return seconds


if __name__ == "__main__":
    main()
