"""Times a sweep of two single-thread points, one after the other and side by side.

    python benchmarks/parallel.py repeats=3 model=smollm2_135m

Every turn starts with empty results and without any cached stage. The two points share nothing
(two methods). Words that are not its own (`repeats`, `launcher`) go to both sweeps.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # run the code of this clone, whichever clone's environment it is
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import os
import statistics
import subprocess
import tempfile
import time

from runners.errors import UserError
from runners.store.files import cache_root

ROOT = Path(__file__).resolve().parents[1]
POINTS = ("method=skipgpt,d_llm", "sparsity=0.4", "tracking=off", "-m")
SHARED = ("models", "datasets")
"""Folders of the cache that hold downloads, which no turn should pay for."""


def main() -> None:
    """Print both times and their ratio for each turn, then the median of the ratios."""
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    repeats = int(given.pop("repeats", 3))
    launcher = given.pop("launcher", "joblib")
    words = [f"{key}={value}" for key, value in given.items()]
    beside = [f"hydra/launcher={launcher}"]
    beside += ["hydra.launcher.n_jobs=2"] if launcher == "joblib" else []
    beside += ["hydra.launcher.workers=2"] if launcher == "ray" else []
    ratios = []
    for turn in range(repeats):
        serial, parallel = _seconds(words), _seconds([*words, *beside])
        ratios.append(serial / parallel)
        sys.stdout.write(f"{turn}: {serial:.1f} s, {parallel:.1f} s, {ratios[-1]:.2f}\n")
        sys.stdout.flush()
    sys.stdout.write(f"{launcher}: {statistics.median(ratios):.2f} times as fast as serial\n")


def _seconds(words: list[str]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        cache.mkdir()
        for name in SHARED:
            if (cache_root(None) / name).is_dir():
                (cache / name).symlink_to(cache_root(None) / name)
        places = [f"results_dir={folder}/results", f"cache_dir={cache}"]
        command = [sys.executable, str(ROOT / "runners" / "sweep.py"), *POINTS, *places, *words]
        began = time.perf_counter()
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        seconds = time.perf_counter() - began
    if done.returncode:
        raise UserError(f"the sweep ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    return seconds


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
