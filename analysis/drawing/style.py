"""One look for every picture: colour-blind-safe, told apart in grey print, fonts embedded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

# Okabe and Ito (2008), dark ones first; yellow is too faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
LINES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))
REFERENCE = "#555555"
DASHED: dict[str, Any] = {"color": REFERENCE, "linestyle": (0, (4, 2)), "linewidth": 1}
LEGEND: dict[str, Any] = {"loc": "outside upper center", "ncols": 4, "frameon": False}
Looks = dict[str, dict[str, Any]]
"""Colour, marker and line of each name, as keywords of `Axes.plot`."""
COLUMN_WIDTH_IN = 3.4
"""Inches: one column of a two-column paper."""

SETTINGS: dict[str, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "legend.fontsize": 7.5,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "lines.linewidth": 1.3,
    "lines.markersize": 4.2,
    "errorbar.capsize": 1.8,
    "pdf.fonttype": 42,
    "ps.fonttype": 42,
    "svg.hashsalt": "routebench",
    "figure.dpi": 100,
    "savefig.dpi": 250,
}


@contextmanager
def paper() -> Iterator[None]:
    """Apply the style inside the block; draws without a display."""
    mpl.use("Agg")
    with mpl.rc_context(SETTINGS):  # type: ignore[arg-type]
        yield


def looks(names: Iterable[str]) -> Looks:
    """Choose colour, marker and line of each name.

    A name keeps its look from one picture to the next, because it comes from the name itself;
    where two names of a picture would share a colour or a marker, the later one takes the next.
    """
    chosen: Looks = {}
    for name in sorted(set(names)):
        start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
        chosen[name] = {
            "color": _free(COLOURS, start, [look["color"] for look in chosen.values()]),
            "marker": _free(MARKERS, start // 7, [look["marker"] for look in chosen.values()]),
            "linestyle": _free(LINES, start // 63, [k["linestyle"] for k in chosen.values()]),
        }
    return chosen


def _free(choices: tuple[Any, ...], start: int, taken: list[Any]) -> Any:
    """The first choice from `start` on that is used least."""
    ring = [choices[(start + step) % len(choices)] for step in range(len(choices))]
    return min(ring, key=taken.count)


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write `<stem>.png` and `<stem>.pdf`; the figure is closed."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for ending in ("png", "pdf"):
        path = stem.parent / f"{stem.name}.{ending}"
        metadata = {"CreationDate": None} if ending == "pdf" else {"Software": None}
        figure.savefig(path, metadata=metadata)
        written.append(path)
    plt.close(figure)
    return written
