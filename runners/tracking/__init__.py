"""Mirror a run to W&B or TensorBoard."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runners.point_config import TrackingConfig
from runners.tracking.base import Run, Safe, Tracker

log = logging.getLogger(__name__)


@contextmanager
def open_tracker(
    tracking: TrackingConfig,
    folder: Path,
    *,
    job: str,
    identity: Mapping[str, Any],
    config: Mapping[str, Any],
) -> Iterator[Safe]:
    """The tracker that the config asks for, closed at the end whatever happens.

    Args:
        folder: of the point; its name tells the run apart.
        job: kind of work: sweep, train, score or speed.
        identity: method, model, data, seed and target: the run's name and searchable fields.
        config: of the point, as JSON types without secrets.
    """
    run = Run(tracking, config, folder, job, identity, _tags(tracking, identity, config))
    tracker = Safe(_open(run))
    failed = True
    try:
        yield tracker
        failed = False
    finally:
        tracker.close(failed=failed)


def _open(run: Run) -> Tracker | None:
    try:
        if run.tracking.backend == "tensorboard":
            from runners.tracking.tensorboard_tracker import TensorBoardTracker

            return TensorBoardTracker(run)
        if run.tracking.backend == "wandb":
            from runners.tracking.wandb_tracker import open_wandb

            return open_wandb(run)
    except Exception as error:
        log.warning("no tracking for this point, the run goes on: %s", error)
    return None


def _tags(
    tracking: TrackingConfig, identity: Mapping[str, Any], config: Mapping[str, Any]
) -> list[str]:
    """Method, model, text, budget, experiment and the user's own, at most 64 characters each."""
    from hydra.core.hydra_config import HydraConfig

    words = [identity.get(key) for key in ("method", "model", "data")]
    words.append((config.get("budget") or {}).get("name"))
    if HydraConfig.initialized():
        words.append(HydraConfig.get().runtime.choices.get("experiment"))
    return list(dict.fromkeys(str(word)[:64] for word in (*words, *tracking.tags) if word))
