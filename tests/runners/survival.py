"""What a disturbed sweep has to leave behind: all that an undisturbed one does."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from tests.conftest import Commands

MEASURED = {"seconds", "peak_memory_bytes", "cached", "identity", "content_sha256"}
"""Fields of a record that may differ between two runs of the same point."""
RECIPE = (
    "method=informed",
    "method.rank=4",
    "method.forecaster.fit=sgd",
    "method.train=end_to_end",
    "method.targets=[]",
    "method.lora={rank: 2, alpha: 4, dropout: 0.1, targets: [q, v]}",
)
"""Three gradient stages with momentum, a schedule, Gumbel noise and dropout."""


def numbers(value: Any) -> Any:
    """A record without what it measured about this machine."""
    if isinstance(value, dict):
        return {k: numbers(v) for k, v in value.items() if k not in MEASURED}
    return [numbers(v) for v in value] if isinstance(value, list) else value


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Whole lines of a point's log, of one kind."""
    found, log = [], folder / "log.jsonl"
    for line in log.read_bytes().splitlines() if log.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [event for event in found if event.get("event") == kind]


def outcome(commands: Commands) -> dict[str, Any]:
    """All that may not depend on disturbances, by point: figures, items, tensors and curves."""
    found = {}
    for file in sorted(commands.results.glob("*/result.json")):
        folder = file.parent
        steps = [(e["stage"], e["step"], e["loss"]) for e in events(folder, "step")]
        steps.sort(key=lambda step: step[0])  # a stage that is made again comes later in the log
        found[folder.name] = {
            "record": numbers(json.loads(file.read_bytes())),
            "items": pd.read_parquet(folder / "items.parquet").to_csv(),
            "tensors": [p.read_bytes() for p in sorted((folder / "routed").glob("*.safetensors"))],
            "curve": steps,
            "left behind": sorted(
                p.name for p in folder.rglob("*") if p.name.endswith(".tmp") or p.name[:2] == ".r"
            ),
        }
    return found


def leftovers(cache: Path) -> list[str]:
    """Checkpoints and partial files that a finished sweep still keeps."""
    return [p.name for p in (cache / "stages").iterdir() if p.suffix in (".checkpoint", ".tmp")]


@dataclass
class Killer:
    """Runs a command again and again and kills it at random moments, until it is through.

    Attributes:
        words: of `runners/sweep.py`.
        mean_s: of the time between the moment at which a process is at work and its death.
    """

    commands: Commands
    words: tuple[str, ...]
    seed: int = 0
    mean_s: float = 1.5
    kills: int = 0
    places: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def run(self, limit: int, timeout_s: float = 120.0) -> None:
        """Kill at most `limit` times; then let it finish."""
        for _ in range(limit):
            process = self.commands.start("sweep", *self.words)
            self._wait_for_work(process, timeout_s)
            try:
                process.wait(self.random.expovariate(1 / self.mean_s))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                self.kills += 1
                self.places[self._place(process.pid)] += 1
                continue
            assert process.returncode == 0
            return
        done = self.commands.run("sweep", *self.words)
        assert done.code == 0, done.stdout + done.stderr

    def _wait_for_work(self, process: subprocess.Popen[bytes], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while process.poll() is None and self._point_of(process.pid) is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def _point_of(self, pid: int) -> Path | None:
        """The point that a process has marked as its own last."""
        mine = []
        for file in self.commands.results.glob("*/status.json"):
            try:
                status = json.loads(file.read_bytes())
            except (OSError, ValueError):
                continue
            if status["pid"] == pid:
                mine.append((file.stat().st_mtime_ns, file.parent, status["state"]))
        return max(mine)[1] if mine else None

    def _place(self, pid: int) -> str:
        """What the process was doing, from the last line of its log."""
        folder = self._point_of(pid)
        assert folder is not None
        if (folder / "result.json").exists():
            return "between points"
        if (folder / "items.parquet").exists():
            return "record"
        steps, stages = events(folder, "step"), events(folder, "stage")
        ended = {stage["name"] for stage in stages}
        if "calibrate" in ended:
            return "evaluation"
        running = [step["stage"] for step in steps if step["stage"] not in ended]
        return f"stage {running[-1]}" if running else "loading or a fit"
