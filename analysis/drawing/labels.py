"""Name lines at their ends, and what lies above the axes at their upper edge, without overlap."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.optimize import isotonic_regression

from analysis.drawing.style import Looks

FONT_PT = 6.5
LINE_PT = 7.6
ARROW_PT = 4.2
WIDEST = 30
"""Letters of a label's line."""
ROOM = 1.03
"""Where labels begin, in widths of the axes."""
ABOVE = "\N{BLACK UP-POINTING TRIANGLE}"


@dataclass(frozen=True)
class End:
    """Where a line ends in its axes, both of whose sides count as 1."""

    name: str
    x: float
    y: float
    """At most 1."""
    look: dict[str, Any]
    above: tuple[float, ...] = ()
    """Values that lie above the axes, from the left to the right."""
    leaves: float = 0.0
    """Where the first of these lies."""

    @property
    def text(self) -> str:
        """What stands beside the axes."""
        if not self.above:
            return textwrap.fill(self.name, WIDEST)
        values = ", ".join(short(value) for value in self.above)
        return textwrap.fill(f"{ABOVE} {self.name} {values}", WIDEST)


def label_ends(figure: Figure, looks: Looks) -> None:
    """Label each line of `looks` in every panel of a figure that is drawn, to its right.

    A line that leaves its axes at the top gets an arrow there, and its label says the values above.
    """
    figure.draw_without_rendering()  # the sizes of the axes are known from here on
    for panel in figure.axes:
        found = (_end(panel, name, look) for name, look in looks.items())
        ends = [end for end in found if end is not None]
        if ends:
            _write(panel, ends)
            _arrows(panel, [end for end in ends if end.above])


def _end(panel: Axes, name: str, look: dict[str, Any]) -> End | None:
    """Where a line ends; None if the panel does not have it."""
    handles, labels = panel.get_legend_handles_labels()
    if name not in labels:
        return None
    drawn: Any = handles[labels.index(name)]
    data = getattr(drawn, "lines", (drawn,))[0].get_xydata()
    data = data[np.isfinite(data).all(axis=1)]
    if not len(data):
        return None
    # from data to shares of the axes, whatever the scale and direction
    at = (panel.transData + panel.transAxes.inverted()).transform(data)
    order = np.argsort(at[:, 0], kind="stable")
    at, values = at[order], data[order, 1]
    outside = at[:, 1] > 1 + 1e-9
    if not outside.any():
        return End(name, float(at[-1, 0]), float(at[-1, 1]), look)
    above = tuple(float(value) for value in values[outside])
    return End(name, float(at[-1, 0]), 1.0, look, above, float(at[outside][0, 0]))


def _write(panel: Axes, ends: Sequence[End]) -> None:
    """Write the labels: each beside its line's end, those that say what lies above in between."""
    unit = LINE_PT / _points(panel, "height")
    inside = sorted((end for end in ends if not end.above), key=lambda end: -end.y)
    sizes = [unit * (1 + end.text.count("\n")) for end in inside]
    places = spread([end.y for end in inside], sizes)
    for end, y in zip(inside, places, strict=True):
        line = {"color": end.look["color"], "linewidth": 0.5, "alpha": 0.6, "clip_on": False}
        panel.plot([end.x, ROOM - 0.01], [end.y, y], transform=panel.transAxes, **line)
    taken = list(zip(places, sizes, strict=True))
    outside = sorted((end for end in ends if end.above), key=lambda end: -max(end.above))
    for end in outside:  # the worst first
        taken.append(highest(taken, unit * (1 + end.text.count("\n"))))
    for end, (y, _) in zip([*inside, *outside], taken, strict=True):
        where: dict[str, Any] = {"va": "center", "linespacing": 1.0, "transform": panel.transAxes}
        panel.text(ROOM, y, end.text, color=end.look["color"], fontsize=FONT_PT, **where)


def _arrows(panel: Axes, ends: Sequence[End]) -> None:
    """Mark where lines leave the axes."""
    ordered = sorted(ends, key=lambda end: -end.leaves)
    width = ARROW_PT / _points(panel, "width")
    for end, x in zip(
        ordered, spread([e.leaves for e in ordered], [width] * len(ends)), strict=True
    ):
        filled = end.look.get("markerfacecolor", end.look["color"])
        look = {"marker": "^", "markersize": ARROW_PT - 0.6, "markerfacecolor": filled}
        colour = end.look["color"]
        panel.plot(x, 1.0, color=colour, transform=panel.transAxes, clip_on=False, **look)


def spread(wanted: Sequence[float], sizes: Sequence[float], top: float = 1.0) -> list[float]:
    """Move places apart as little as possible (least squares), in their order.

    Args:
        wanted: descending.
        sizes: of what stands at each place; none overlaps its neighbour.
        top: the first place is at most there; the last one may go below 0 if there is no room.
    """
    half = np.array(sizes) / 2
    gaps = np.concatenate([[0.0], np.cumsum(half[:-1] + half[1:])])
    moved = isotonic_regression(np.array(wanted) + gaps, increasing=False).x
    lowest = min(top, gaps[-1])
    return [float(place) for place in np.clip(moved, lowest, top) - gaps]


def highest(taken: Sequence[tuple[float, float]], size: float) -> tuple[float, float]:
    """The highest place, at most at 1, for something of a size that overlaps nothing.

    Args:
        taken: (place, size) of what is there.
    """
    free = [1.0, *sorted((y - (own + size) / 2 for y, own in taken), reverse=True)]
    fits = (
        y
        for y in free
        if y <= 1.0 and all(abs(y - other) > (own + size) / 2 - 1e-9 for other, own in taken)
    )
    return next(fits), size


def short(value: float) -> str:
    """Write a value in few letters: `17.4`, `223`, `1.4e6`."""
    if value < 1000:
        return f"{value:.3g}"
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def _points(panel: Axes, side: str) -> float:
    """Height or width of the axes, points."""
    box = panel.get_window_extent()
    return float(getattr(box, side)) * 72 / panel.figure.dpi
