"""Mirrors a point's curves and figures to Weights & Biases; never the source of the analysis."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from runners.store import redact

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """Where curves go while a point runs."""

    def log(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add one point of each curve."""

    def summary(self, result: Mapping[str, Any]) -> None:
        """Keep the figures of the finished record."""

    def close(self, *, failed: bool) -> None:
        """End the run; the next point of the same process starts its own."""


class NoTracker:
    """`tracking=off`."""

    def log(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Do nothing."""

    def summary(self, result: Mapping[str, Any]) -> None:
        """Do nothing."""

    def close(self, *, failed: bool) -> None:
        """Do nothing."""


class WandbTracker:
    """One W&B run. A failing service is reported once and never stops the point.

    Args:
        run: of `wandb.init`.
    """

    def __init__(self, run: Any) -> None:
        self.run = run
        self.works = True
        self.stages: set[str] = set()

    def log(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add one point of each curve; `<stage>/step` becomes the x axis of `<stage>/*`."""
        for name in metrics:
            stage, _, last = name.rpartition("/")
            if last == "step" and stage not in self.stages:
                self.stages.add(stage)
                self._try(partial(self.run.define_metric, f"{stage}/*", step_metric=name))
        self._try(lambda: self.run.log(dict(metrics), step=step))

    def summary(self, result: Mapping[str, Any]) -> None:
        """Every number and label of the record, nested keys joined with `/`."""
        self._try(lambda: self.run.summary.update(flat(result)))

    def close(self, *, failed: bool) -> None:
        """Finish the run, marked as failed or not."""
        self._try(lambda: self.run.finish(exit_code=int(failed)))

    def _try(self, call: Callable[[], Any]) -> None:
        if not self.works:
            return
        try:
            call()
        except Exception as error:
            self.works = False
            log.warning("tracking stopped, the run goes on: %s", error)


@contextmanager
def open_tracker(config: Mapping[str, Any], folder: Path, **identity: Any) -> Iterator[Tracker]:
    """The tracker that the config asks for, closed at the end whatever happens.

    Args:
        config: resolved; `tracking.backend` is `off` or `wandb`.
        folder: of the point; its name tells the run apart.
        identity: method, model, data, seed and target: the run's name and searchable fields.
    """
    tracker = _open(config, folder, identity)
    failed = True
    try:
        yield tracker
        failed = False
    finally:
        tracker.close(failed=failed)


def _open(config: Mapping[str, Any], folder: Path, identity: Mapping[str, Any]) -> Tracker:
    tracking = config["tracking"]
    if tracking["backend"] != "wandb":
        return NoTracker()
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        import wandb

        Path(tracking["dir"]).mkdir(parents=True, exist_ok=True)
        run = wandb.init(
            project=tracking["project"],
            entity=tracking["entity"],
            group=tracking["group"],
            name=f"{identity['method']}-{identity['sparsity_target']:g}-s{identity['seed']}",
            job_type=identity["method"],
            config={**redact(config), "fingerprint": folder.name, "variant": identity["variant"]},
            dir=tracking["dir"],
            mode=tracking["mode"],
            reinit="finish_previous",
        )
    except Exception as error:
        log.warning("no tracking for this point, the run goes on: %s", error)
        return NoTracker()
    return WandbTracker(run)


def flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a/b": 1}`; lists (per layer, per document) stay in the store."""
    fields: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            fields |= flat(value, f"{prefix}{key}/")
        elif value is None or isinstance(value, (bool, int, float, str)):
            fields[f"{prefix}{key}"] = value
    return fields
