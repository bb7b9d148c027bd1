"""The plan as text: one block a point, then the sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from runners.planning.estimate import Part, PlannedPoint, totals

COLUMNS = ("weights", "added", "activations", "optimiser", "statistics")
HEAD = f"{'':28}{'tokens':>9}{'PFLOP':>10}{'hours':>10}  " + "".join(
    f"{name:>12}" for name in (*COLUMNS, "GB in all")
)


def table(
    points: Sequence[PlannedPoint], hardware: Mapping[str, Any], options: Mapping[str, Any]
) -> str:
    """Every point's stages with tokens, FLOPs, hours and GB; what is shared counts once."""
    lines = [f"{hardware['name']}, {options['utilisation']:.0%} of its peak; memory in GB", HEAD]
    seen: set[str] = set()
    numbers: dict[str, int] = {}
    for number, point in enumerate(points):
        first = numbers.setdefault(point.fingerprint, number)
        if first < number:
            lines.append(f"#{number} {point.label}: the same point as #{first}")
            continue
        state = "complete" if point.complete else point.refused or "to do"
        lines.append(f"#{number} {point.label} [{point.fingerprint}] {state}")
        for part in point.parts:
            lines.append(_line(part, again=part.key in seen))
            seen.add(part.key)
    lines.append(_sum(points, hardware))
    unknown = sorted({name for point in points for name in point.not_estimated})
    if unknown:
        lines.append(f"not estimated: {', '.join(unknown)} (plan.tasks, plan.texts)")
    return "\n".join(lines)


def _line(part: Part, *, again: bool) -> str:
    notes = "cached" if part.cached else ""
    if part.cached is None and not part.name.startswith("evaluate"):
        notes = "cache unknown"
    if again:
        notes = "shared, above"
    sizes = [part.bytes.get(name, 0) for name in COLUMNS]
    gb = "".join(f"{size / 1e9:12.2f}" for size in (*sizes, sum(sizes)))
    return (
        f"   {part.name:25}{count(part.tokens):>9}{part.flops / 1e15:10.3g}"
        f"{part.hours:10.2g}  {gb}  {notes}"
    ).rstrip()


def _sum(points: Sequence[PlannedPoint], hardware: Mapping[str, Any]) -> str:
    total = totals(list(points))
    peak, memory = total["peak_bytes"] / 1e9, hardware["memory_gb"]
    fits = "fits" if peak < memory else "DOES NOT FIT"
    return (
        f"total: {total['points']:.0f} points, {total['points_left']:.0f} to do; "
        f"{count(total['tokens'])} tokens, {total['flops'] / 1e15:.4g} PFLOP, "
        f"{total['hours']:.3g} hours, {total['hours_left']:.3g} of them left; "
        f"peak {peak:.1f} GB of {memory:g}: {fits}"
    )


def count(number: float) -> str:
    """1.2k, 3.4M, 5.6G."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"
