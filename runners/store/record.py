"""The record of a point: what `runners` writes and `analysis` reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

SCHEMA_VERSION = 1
DRIFT = 0.02
"""Realised and aimed sparsity further apart than this are told of."""
OFF_TARGET = 0.03
"""The same of the sparsity that a gradient stage ran at."""


@dataclass(frozen=True)
class Record:
    """`result.json` of a point; a field without a value is left out.

    A failed point has what names it and the reason. One that was only timed has no quality.
    """

    method: str
    variant: str
    """Options that differ from the method's file."""
    model: str
    data: str | None
    seed: int
    sparsity_target: float
    status: Literal["complete", "failed"] = "complete"
    reason: str | None = None
    """Why it failed."""
    evaluated: Literal[False] | None = None
    """False for a point that was only timed."""
    perplexity: Mapping[str, Mapping[str, Any]] | None = None
    """By text: value, 95 % interval (low, high), the dense model's value."""
    accuracy: Mapping[str, Mapping[str, Any]] | None = None
    """By task: value, stderr, metric (`acc`, `acc_norm`, ...), n, the dense model's value and
    stderr; of choices the mean margin of the right one; how sparsity was counted."""
    generation: Mapping[str, Any] | None = None
    """Share of the dense model's greedy continuations that is kept, and those of a gallery; with
    the settings."""
    sparsity_realised: float | None = None
    """Share of bypassed (token, unit) pairs on the test text."""
    realised: Mapping[str, Any] | None = None
    """Of it: by unit kind and layer; on calibration text; what the method could reach."""
    flops_ratio: float | None = None
    kv_bytes_ratio: float | None = None
    """Routed over dense."""
    stages: Sequence[Mapping[str, Any]] | None = None
    """Name, seconds, steps, tokens, peak memory and final loss of each."""
    added_parameters: int | None = None
    options: Mapping[str, Any] | None = None
    """Constructor arguments of the method."""
    kv_policy: str | None = None
    lora: Mapping[str, Any] | None = None
    threshold: float | None = None
    identity: Mapping[str, Any] | None = None
    """Fingerprint, weights hash, dtype, objective, budget, code, packages and machine."""
    seconds: float | None = None
    speed: Mapping[str, Any] | None = None
    """Timed cases of prefill and decode."""
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> dict[str, Any]:
        """The fields that have a value."""
        every = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in every.items() if value is not None}

    @property
    def headline(self) -> str:
        """The figures that a log line shows."""
        parts = [f"realised {self.sparsity_realised:.3f}"]
        for name, entry in (self.perplexity or {}).items():
            parts.append(f"perplexity {name} {entry['value']:.2f} (dense {entry['dense']:.2f})")
        for task, entry in (self.accuracy or {}).items():
            metric = entry["metric"]
            parts.append(f"{task} {metric} {entry['value']:.3f} (dense {entry['dense']:.3f})")
        if self.generation is not None:
            parts.append(f"{self.generation['kept']['value']:.3f} of dense's continuations kept")
        return ", ".join(parts)

    @property
    def warnings(self) -> list[str]:
        """Lines about what makes the point no fair one at its target."""
        told = [] if self.drift is None else [self.drift]
        return told + [
            f"stage {name} trained at sparsity {realised:.3f}, not at {aimed:.3f}, where the "
            "method is judged: method.training.hold=0.5 keeps it there"
            for name, realised, aimed in self.off_target
        ]

    @property
    def off_target(self) -> list[tuple[str, float, float]]:
        """(stage, sparsity that it trained at, its target) where the two are far apart.

        A stage that trains for no target is compared with the point's.
        """
        found = []
        for stage in self.stages or ():
            realised, aimed = stage.get("sparsity"), stage.get("target")
            aimed = self.sparsity_target if aimed is None else aimed
            if realised is not None and abs(realised - aimed) > OFF_TARGET:
                found.append((stage["name"], realised, aimed))
        return found

    @property
    def drift(self) -> str | None:
        """A line about a point whose test text has another sparsity than calibration gave it."""
        assert self.realised is not None and self.sparsity_realised is not None
        realised, aimed = self.sparsity_realised, self.realised["achievable"]
        if abs(realised - aimed) <= DRIFT:
            return None
        return (
            f"realised {realised:.3f} on the test text, {self.realised['calibration']:.3f} on "
            f"calibration text: compare it with points at {realised:.2f}, not at {aimed:.2f}"
        )
