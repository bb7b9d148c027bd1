"""TensorBoard: event files in `<tracking.dir>/<group>/<point>-<job>`, no service, no account."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.tensorboard import SummaryWriter

from runners.tracking.base import Files, Rows, Run, flat

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class TensorBoardTracker:
    """One folder of events; a point that is run again adds a file to it.

    Args:
        run: what to track.
    """

    def __init__(self, run: Run) -> None:
        tracking = run.tracking
        folder = Path(tracking.dir) / str(tracking.group) / f"{run.folder.name}-{run.job}"
        self.writer = SummaryWriter(str(folder))
        self._text("run", {"name": run.name, "tags": list(run.tags), "point": str(run.folder)})
        self._text("config", run.config)

    def log(self, metrics: Mapping[str, float]) -> None:
        """Scalars of a stage over its own step."""
        for name, value in metrics.items():
            stage, _, last = name.rpartition("/")
            if last != "step":
                step = metrics.get(f"{stage}/step")
                self.writer.add_scalar(name, value, None if step is None else int(step))

    def table(self, name: str, rows: Rows) -> None:
        """A Markdown table under Text."""
        if not rows:
            return
        lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
        text = "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
        self.writer.add_text(name, text)

    def picture(self, name: str, figure: Figure) -> None:
        """Under Images."""
        self.writer.add_figure(name, figure)

    def files(self, files: Files) -> None:
        """Where the files are and what they were made from, under Text; nothing is copied."""
        self._text(
            f"{files.kind}/{files.name}",
            {
                "paths": [str(path) for path in files.paths],
                "facts": files.facts,
                "inputs": {kind: {"name": name, **facts} for kind, name, facts in files.inputs},
            },
        )

    def summary(self, result: Mapping[str, Any]) -> None:
        """The record's numbers, as scalars `result/*`."""
        for name, value in flat(result).items():
            if isinstance(value, (int, float)):
                self.writer.add_scalar(f"result/{name}", value, 0)

    def close(self, *, failed: bool) -> None:
        """Write what is left."""
        self._text("ended", {"failed": failed})
        self.writer.close()

    def _text(self, name: str, value: Mapping[str, Any]) -> None:
        text = json.dumps(value, indent=2, default=str)
        self.writer.add_text(name, "\n".join(f"    {line}" for line in text.splitlines()))
