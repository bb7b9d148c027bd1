"""Weights & Biases: one run per point and kind of work, resumed after a crash, never waited for.

Offline runs lie in `<tracking.dir>/wandb/offline-run-*`; `wandb sync` of these folders uploads
them, several of one run in the order they were made.
"""

from __future__ import annotations

import io
import json
import logging
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from runners.store.files import write_json_atomic
from runners.tracking.base import Files, Rows, Run, flat

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

IDS_FILE = "tracking.json"
QUALITY, DONE = ("sweep", "score"), "quality"
"""Kinds of work whose runs have a point's quality, and the key of such a run that has ended."""


class WandbTracker:
    """One W&B run.

    Args:
        run: of `wandb.init`.
        ids: where its id is kept until it has ended well.
    """

    def __init__(self, run: Any, ids: RunIds) -> None:
        self.run, self.ids = run, ids
        self.stages: set[str] = set()

    def log(self, metrics: Mapping[str, float]) -> None:
        """Add one point of each curve; `<stage>/step` becomes the x axis of `<stage>/*`."""
        for name in metrics:
            stage, _, last = name.rpartition("/")
            if last == "step" and stage not in self.stages:
                self.stages.add(stage)
                self.run.define_metric(f"{stage}/*", step_metric=name)
        self.run.log(dict(metrics))

    def table(self, name: str, rows: Rows) -> None:
        """A `wandb.Table`."""
        import wandb

        columns: list[Any] = list(rows[0]) if rows else []
        data: list[Any] = [[row[column] for column in columns] for row in rows]
        self.run.log({name: wandb.Table(columns=columns, data=data)})

    def picture(self, name: str, figure: Figure) -> None:
        """A `wandb.Image`."""
        import wandb
        from PIL import Image

        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150)
        with Image.open(buffer) as picture:
            self.run.log({name: wandb.Image(picture)})

    def files(self, files: Files) -> None:
        """An artifact; what it was made from are artifacts that the run uses.

        `Run.use_artifact` refuses to work offline and waits for the service online. What it calls
        for an artifact that is new does neither, so that the lineage is there after `wandb sync`
        too. The inputs' facts also stand in the metadata.
        """
        import wandb

        inputs = {kind: {"name": name, **facts} for kind, name, facts in files.inputs}
        for kind, name, facts in files.inputs:
            used = wandb.Artifact(_artifact_name(name), type=kind, metadata=dict(facts))
            with used.new_file("facts.json") as file:
                json.dump({"name": name, **facts}, file, indent=2, sort_keys=True)
            self.run._log_artifact(used, use_after_commit=True)
        made = wandb.Artifact(
            _artifact_name(files.name), type=files.kind, metadata={**files.facts, "inputs": inputs}
        )
        for path in files.paths:
            made.add_dir(str(path)) if path.is_dir() else made.add_file(str(path))
        self.run.log_artifact(made)

    def summary(self, result: Mapping[str, Any]) -> None:
        """As scalars of the run, nested keys joined with `/`."""
        self.run.summary.update(flat(result))

    def close(self, *, failed: bool) -> None:
        """Finish the run, marked as failed or not; a failed point that is tried again resumes it.

        Raises:
            TimeoutError: the service takes too long; the run's data is on disk.
        """
        if not failed:
            self.ids.ended()
        try:
            self.run.finish(exit_code=int(failed))
        except TimeoutError as error:
            folder = Path(str(self.run.dir)).parent
            raise TimeoutError(f"{error} Upload it later: wandb sync {folder}") from error


class RunIds:
    """The id of a point's W&B run of one kind, in `tracking.json` beside its record.

    Speed goes into the run that has the point's quality, where there is one.

    Args:
        folder: of the point.
        job: kind of work.
    """

    def __init__(self, folder: Path, job: str) -> None:
        self.path, self.job, self.point = folder / IDS_FILE, job, folder.name

    def current(self) -> str:
        """The id of the run that has not ended well, or a new one, kept from now on."""
        kept = self._read()
        found = kept.get(self.job)
        if self.job == "speed":
            found = found or next((kept[job] for job in QUALITY if job in kept), kept.get(DONE))
        found = found or f"{self.point}-{self.job}-{secrets.token_hex(3)}"
        write_json_atomic(self.path, {**kept, self.job: found})
        return str(found)

    def ended(self) -> None:
        """The next run of this kind gets an id of its own."""
        kept = self._read()
        found = kept.pop(self.job, None)
        if self.job in QUALITY:
            kept[DONE] = found
        write_json_atomic(self.path, kept)

    def _read(self) -> dict[str, Any]:
        try:
            kept = json.loads(self.path.read_bytes())
        except (OSError, ValueError):
            return {}
        return kept if isinstance(kept, dict) else {}


OFFLINE_START_S = 60
"""Nobody answers slowly here: what takes time is a process that starts on a busy machine."""


def open_wandb(run: Run) -> WandbTracker:
    """Start or resume the point's run; offline where none can be started in time.

    Neither code, git remotes, the command line nor the console's text is uploaded: all may hold
    keys, and what matters of them is in the record.
    """
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    tracking = run.tracking
    Path(tracking.dir).mkdir(parents=True, exist_ok=True)
    ids = RunIds(run.folder, run.job)
    own = ids.current()
    options: dict[str, Any] = {
        "project": tracking.project,
        "entity": tracking.entity,
        "group": tracking.group,
        "id": own,
        "resume": "allow",
        "name": run.name,
        "job_type": own.rsplit("-", 2)[1],  # of the run that is resumed, if one is
        "tags": list(run.tags),
        "config": {
            **run.config,
            "fingerprint": run.folder.name,
            "variant": run.identity["variant"],
            "method_name": run.identity["method"],
            "setting": _setting(run),
        },
        "dir": tracking.dir,
        "reinit": "finish_previous",
    }

    def start(mode: Literal["online", "offline"], init_timeout_s: float) -> WandbTracker:
        settings = wandb.Settings(
            console="off",
            save_code=False,
            disable_git=True,
            x_disable_meta=True,
            init_timeout=init_timeout_s,
            finish_timeout=tracking.finish_timeout_s,
            finish_timeout_raises=True,
        )
        return WandbTracker(wandb.init(**options, mode=mode, settings=settings), ids)

    try:
        return start(tracking.mode, tracking.init_timeout_s)
    except Exception as error:
        log.warning("W&B did not start, tried again offline: %s", error)
    # the service's process may be dead, or hold the run's id; the next run needs a new one, and
    # an inherited service outlives the teardown
    with suppress(Exception):
        wandb.teardown()
    os.environ.pop("WANDB_SERVICE", None)
    return start("offline", max(OFFLINE_START_S, tracking.init_timeout_s))


def _setting(run: Run) -> str:
    """Runs of one setting may share a picture; the same words as in the analysis' file names."""
    budget = (run.config.get("budget") or {}).get("name")
    return f"{run.identity['model']}-{run.identity['data']}-{budget}"


def _artifact_name(name: str) -> str:
    """With the characters that W&B allows."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)[:128]
