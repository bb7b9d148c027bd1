"""Mirrors a point's curves and figures to a tracking service; never the source of the analysis."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from runners.point_config import TrackingConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Files:
    """Files that a run made, with what they were made from.

    Attributes:
        inputs: (kind, name, facts) of each, e.g. ("base_model", "llama", {"weights_sha256": ...}).
    """

    kind: str
    name: str
    paths: Sequence[Path]
    facts: Mapping[str, Any] = field(default_factory=dict)
    inputs: Sequence[tuple[str, str, Mapping[str, Any]]] = ()


class Tracker(Protocol):
    """Where a point's figures go while it runs."""

    def log(self, metrics: Mapping[str, float]) -> None:
        """Add one point of each curve; `<stage>/step` is the x axis of `<stage>/*`."""

    def table(self, name: str, rows: Rows) -> None:
        """Keep a table; every row has the same keys."""

    def picture(self, name: str, figure: Figure) -> None:
        """Keep a picture."""

    def files(self, files: Files) -> None:
        """Keep files, with their lineage."""

    def summary(self, result: Mapping[str, Any]) -> None:
        """Keep the figures of the finished record."""

    def close(self, *, failed: bool) -> None:
        """End the run; the next point of the same process starts its own."""


@dataclass(frozen=True)
class Run:
    """What a backend is opened with.

    Attributes:
        tracking: the config's section.
        config: of the point, without secrets.
        folder: of the point; its name tells the run apart.
        job: sweep, train, score or speed.
        identity: method, variant, model, data, seed and target.
        tags: searchable words.
    """

    tracking: TrackingConfig
    config: Mapping[str, Any]
    folder: Path
    job: str
    identity: Mapping[str, Any]
    tags: Sequence[str] = ()

    @property
    def name(self) -> str:
        """Short label."""
        own = self.identity
        return f"{own['method']}-{own['sparsity_target']:g}-s{own['seed']}"


class Safe:
    """A tracker whose failures are reported once and never stop the point.

    Args:
        tracker: None tracks nothing.
    """

    def __init__(self, tracker: Tracker | None) -> None:
        self.tracker = tracker
        self.active = tracker is not None

    def log(self, metrics: Mapping[str, float]) -> None:
        """`Tracker.log`."""
        self.attempt(lambda tracker: tracker.log(metrics))

    def summary(self, result: Mapping[str, Any]) -> None:
        """`Tracker.summary`."""
        self.attempt(lambda tracker: tracker.summary(result))

    def close(self, *, failed: bool) -> None:
        """`Tracker.close`; tried also where tracking had stopped, to free what it holds."""
        if self.tracker is None:
            return
        try:
            self.tracker.close(failed=failed)
        except Exception as error:
            if self.active:
                log.warning("tracking did not end well, the record is complete: %s", error)

    def attempt(self, call: Callable[[Tracker], object]) -> None:
        """Run a call on the tracker; after its first failure there is no other."""
        if self.tracker is None or not self.active:
            return
        try:
            call(self.tracker)
        except Exception as error:
            self.active = False
            log.warning("tracking stopped, the run goes on: %s", error)


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


def flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a/b": 1}`; lists (per layer, per document) stay in the store."""
    fields: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            fields |= flat(value, f"{prefix}{key}/")
        elif value is None or isinstance(value, (bool, int, float, str)):
            fields[f"{prefix}{key}"] = value
    return fields
