"""Figures as SVG inside a page: no request, text stays text, colours follow the page's theme."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup, escape
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from analysis.drawing import style

INK = {"#000000": "currentColor", "#ffffff": "var(--paper)", "#dddddd": "var(--grid)"}
THEMED = {
    **{colour: f"light-dark({colour},{style.on_dark(colour)})" for colour in style.SERIES},
    style.REFERENCE.lower(): "var(--reference)",
    **INK,
}
"""Colours of `style` in both themes of the page; black is its text colour."""
MARK = re.compile(r'(<use [^>]*x="([-\d.]+)" y="([-\d.]+)"[^>]*?)\s*/>')
"""A point of a line; ticks are marks too."""
Place = tuple[float, float]
"""Points of 1/72 inch from the left and upper edge, as in the SVG, to one digit."""
SWATCH_IN = (0.42, 0.16)


def inline(figure: Figure, *, prefix: str, label: str) -> Markup:
    """Draw a figure, which is then closed, as an `<svg>` element.

    Args:
        prefix: of every id, different for each picture of a page.
        label: for readers that do not see the picture.
    """
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    # a constrained layout has moved the axes to where the file has them
    values = {place: said for panel in figure.axes for place, said in _values(figure, panel)}
    plt.close(figure)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->|\s+xmlns(:\w+)?=\"[^\"]*\"", "", text, flags=re.DOTALL)
    text = text.replace("xlink:href", "href")
    text = re.sub(r'(\sid="|href="#|url\(#)', rf"\1{prefix}-", text)
    text = re.sub(r"#[0-9a-f]{6}\b", lambda found: THEMED.get(found[0], found[0]), text)
    text = MARK.sub(lambda found: _titled(found, values), text)
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None
    opening = f'<svg {box[0]} role="img" aria-label="{escape(label)}">'
    return Markup(re.sub(r"<svg[^>]*>", lambda _: opening, text, count=1))


def _values(figure: Figure, panel: Axes) -> Iterator[tuple[Place, str]]:
    """Say of every point that has a mark where it lies in the SVG, and its values."""
    names = " ".join(panel.get_xlabel().split()), " ".join(panel.get_ylabel().split())
    drawn: Any = [made for made in panel.containers if isinstance(made, ErrorbarContainer)]
    bars = {id(made.lines[0]): made for made in drawn}
    for line in panel.lines:
        made = bars.get(id(line))
        label = str((made or line).get_label())
        if label.startswith("_") or line.get_marker() in ("", "None", None):
            continue
        points = np.column_stack([line.get_xdata(), line.get_ydata()]).astype(float)
        ends = [bar.get_segments() for bar in made.lines[2]] if made else []
        pixels = panel.transData.transform(points) * (72 / figure.dpi)
        height = figure.get_figheight() * 72
        for place, ((x, y), (left, down)) in enumerate(zip(points, pixels, strict=True)):
            said = f"{label}\n{names[0]}: {x:.4g}\n{names[1]}: {y:.4g}"
            if ends and len(ends[0]) == len(points) and len(ends[0][place]) == 2:
                (_, low), (_, high) = ends[0][place]
                said += f" [{low:.4g}, {high:.4g}]" if low < high else ""
            yield (round(float(left), 1), round(height - float(down), 1)), said


def _titled(mark: re.Match[str], values: Mapping[Place, str]) -> str:
    """Put the values of a mark into it, which a browser shows under the pointer."""
    place = round(float(mark[2]), 1), round(float(mark[3]), 1)
    near = ((place[0] + x, place[1] + y) for x in (0, -0.1, 0.1) for y in (0, -0.1, 0.1))
    found = next((values[k] for x, y in near if (k := (round(x, 1), round(y, 1))) in values), None)
    return mark[0] if found is None else f"{mark[1]}><title>{escape(found)}</title></use>"


def swatches(looks: Mapping[str, Any], *, prefix: str) -> list[tuple[str, Markup]]:
    """Draw a legend: (name, its line and marker as `<svg>`) of each look."""
    drawn = []
    for place, (name, look) in enumerate(looks.items()):
        figure = plt.figure(figsize=SWATCH_IN)
        panel = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        panel.plot([0, 0.5, 1], [0, 0, 0], markevery=[1], **look)
        panel.set_xlim(0, 1)
        panel.set_axis_off()
        drawn.append((name, inline(figure, prefix=f"{prefix}{place}", label=name)))
    return drawn
