"""Figures as SVG inside a page: no request, text stays text, colours follow the page's theme."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
from markupsafe import Markup, escape
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from analysis.drawing import style

INK = {"#000000": "currentColor", "#ffffff": "var(--paper)", "#dddddd": "var(--grid)"}
THEMED = {
    **{colour: f"light-dark({colour},{style.on_dark(colour)})" for colour in style.SERIES},
    style.REFERENCE.lower(): "var(--reference)",
    **INK,
}
"""Colours of `style` in both themes of the page; black is its text colour."""
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
    plt.close(figure)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->|\s+xmlns(:\w+)?=\"[^\"]*\"", "", text, flags=re.DOTALL)
    text = text.replace("xlink:href", "href")
    text = re.sub(r'(\sid="|href="#|url\(#)', rf"\1{prefix}-", text)
    text = re.sub(r"#[0-9a-f]{6}\b", lambda found: THEMED.get(found[0], found[0]), text)
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None
    opening = f'<svg {box[0]} role="img" aria-label="{escape(label)}">'
    return Markup(re.sub(r"<svg[^>]*>", lambda _: opening, text, count=1))


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
