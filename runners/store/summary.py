"""What the log says of a finished point."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DRIFT = 0.02
"""Realised and aimed sparsity further apart than this are told of."""


def drift(result: Mapping[str, Any]) -> str | None:
    """A line about a point that the test text finds at another sparsity than calibration put it."""
    realised, aimed = result["sparsity_realised"], result["realised"]["achievable"]
    if abs(realised - aimed) <= DRIFT:
        return None
    return (
        f"realised {realised:.3f} on the test text, {result['realised']['calibration']:.3f} on "
        f"calibration text: compare it with points at {realised:.2f}, not at {aimed:.2f}"
    )


def headline(result: Mapping[str, Any]) -> str:
    """The figures of a record that a log line shows."""
    parts = [f"realised {result['sparsity_realised']:.3f}"]
    for name, entry in result["perplexity"].items():
        parts.append(f"perplexity {name} {entry['value']:.2f} (dense {entry['dense']:.2f})")
    for task, entry in result["accuracy"].items():
        parts.append(f"{task} {entry['value']:.3f} (dense {entry['dense']:.3f})")
    return ", ".join(parts)
