"""Mirrors a point's curves and figures to a tracking service; never the source of the analysis."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
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
        """Keep figures of the run as a whole; later ones join or replace earlier ones."""

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


OF_A_TARGET = ("loss", "sparsity", "gradient_norm")
"""Figures of a step that differ between targets."""


def curves(stage: str, figures: Mapping[str, float], *, apart: bool) -> dict[str, float]:
    """A step's figures under the names of their curves.

    Args:
        figures: with the `target` of the step, if it has one.
        apart: a curve for each target, `<stage>/loss_at_0_25`, where one curve would jump between
            them from step to step.
    """
    if not apart or "target" not in figures:
        return {f"{stage}/{key}": value for key, value in figures.items()}
    ending = f"_at_{figures['target']:g}".replace(".", "_")  # W&B takes a dot for a field's
    return {
        f"{stage}/{key}{ending if key in OF_A_TARGET else ''}": value
        for key, value in figures.items()
        if key != "target"
    }


def flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a/b": 1}`; lists (per layer, per document) stay in the store."""
    fields: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            fields |= flat(value, f"{prefix}{key}/")
        elif value is None or isinstance(value, (bool, int, float, str)):
            fields[f"{prefix}{key}"] = value
    return fields
