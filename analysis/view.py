"""One protocol for what a script shows: rows of the store, panels, a table; as files or a section.

A script of this folder declares one `View`. `cli.run` writes its files, the report and the W&B
report iterate over the views of `report_page.page.VIEWS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.drawing import style, tables
from analysis.drawing.labels import LINE_PT, label_ends
from analysis.drawing.style import Looks
from analysis.frames import DENSE, Store
from analysis.report_page.inline_svg import inline, swatches

COLUMNS = 2
PANEL_IN = (style.COLUMN_WIDTH_IN, 2.4)
STAR = {"color": style.REFERENCE, "marker": "*", "linestyle": ""}
"""The dense model, which takes no look from the methods."""
MAX_ROWS = 250
"""Rows of a table that the page shows; the files beside it hold all."""


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    caption: str
    draw: Callable[[Axes, Looks], object]
    """Draws and labels; the looks are by line."""
    title: str = ""
    """Stands above it where panels stand together without their captions."""


@dataclass(frozen=True)
class Section:
    """A heading of the page with what stands below it."""

    slug: str
    title: str
    note: str = ""
    legend: list[tuple[str, Markup]] = field(default_factory=list)
    pictures: list[tuple[Markup, str]] = field(default_factory=list)
    """(`<svg>`, caption)."""
    tables: list[dict[str, Any]] = field(default_factory=list)
    """Of `page_table`."""
    missing: str = ""
    """Says what fills an empty section."""
    files: list[tuple[str, str]] = field(default_factory=list)
    """(what it is, file in the folder of the plots) of further links."""


@dataclass(frozen=True, eq=False)
class View:
    """What one script shows.

    Args:
        name: begins the names of its files.
        title, note: of its section.
        missing: one line about a store that has nothing to show.
        rows: what it shows of a store, with the column `setting`.
        table: of the rows of one setting (numbers, the same for a reader).
        panels: of the rows of one setting; None for a table alone.
        caption: of the table.
        mark: changes the lines' looks in its legend.
        more: further entries of its legend.
        share: axes that panels of a figure share, as for `plt.subplots`.
        height_in: of a row of panels, inches, at least.
        ends: whether lines are labelled at their ends; else a legend names them.
        remark: says of the rows of one setting what its reader must know.
        printed: whether its script prints the table too.
    """

    name: str
    title: str
    note: str
    missing: str
    rows: Callable[[Store], pd.DataFrame]
    table: Callable[[pd.DataFrame], tuple[pd.DataFrame, pd.DataFrame]]
    caption: str
    panels: Callable[[pd.DataFrame], list[Panel]] | None = None
    mark: Mapping[str, Any] = field(default_factory=dict)
    more: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    share: tuple[Any, Any] = ("col", "row")
    height_in: float = 2.0
    ends: bool = True
    remark: Callable[[pd.DataFrame], str] | None = None
    printed: bool = False

    def save(self, part: pd.DataFrame, title: str, stem: Path) -> list[Path]:
        """Write the figure and the tables of one setting to `<stem>.*`."""
        written = []
        if self.panels is not None:
            with style.paper():
                written = style.save(self.draw(part, title), stem)
        note = self.remark(part) if self.remark else ""
        return written + tables.save(stem, *self.table(part), note)

    def draw(self, part: pd.DataFrame, title: str) -> Figure:
        """Draw all panels of one setting as one figure, labelled at its left and lower edge."""
        assert self.panels is not None
        panels = self.panels(part)
        columns = min(COLUMNS, len(panels))
        rows = -(-len(panels) // columns)
        width = (style.COLUMN_WIDTH_IN + self._beside()) * (2 if columns > 1 else 1.4)
        figure, grid = plt.subplots(
            rows,
            columns,
            figsize=(width, self._height(part) * rows + 0.7),
            squeeze=False,
            sharex=self.share[0],
            sharey=self.share[1],
            layout="constrained",
        )
        looks = looks_of(part)
        for axes, panel in zip(grid.flat, panels, strict=False):
            panel.draw(axes, looks)
            axes.set_title(panel.title)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for axes, below in zip(grid[:-1].flat, grid[1:].flat, strict=True):
            if axes.get_xlabel() == below.get_xlabel():
                axes.set_xlabel("")
        for axes, left in zip(grid[:, :0:-1].flat, grid[:, -2::-1].flat, strict=True):
            if axes.get_ylabel() == left.get_ylabel():
                axes.set_ylabel("")
        named = dict(zip(*reversed(grid[0][0].get_legend_handles_labels()), strict=True))
        if self.ends:
            lines = style.without(looks, DENSE)
            named = roles_of(part) | style.without(named, *lines)
            label_ends(figure, lines)
        words = {"title": title, "title_fontsize": 8, **style.LEGEND}
        figure.legend(named.values(), named.keys(), **words)
        return figure

    def _beside(self) -> float:
        """Inches of labels beside the axes."""
        return 0.5 if self.ends else 0.0

    def _height(self, part: pd.DataFrame) -> float:
        """Of a panel: with room for its labels one below the other."""
        lines = part["line"].nunique() if self.ends else 0
        return max(self.height_in, (lines * LINE_PT + 30) / 72)

    def section(self, part: pd.DataFrame, prefix: str, looks: Looks, stem: str) -> Section:
        """Make the page's section of one setting; each panel is a picture of its own.

        Args:
            prefix: of every id in the page.
            stem: of the files that hold the whole table.
        """
        slug = f"{prefix}-{self.name}"
        if part.empty:
            return Section(slug, self.title, missing=self.missing)
        pictures, legend = [], []
        for place, panel in enumerate(self.panels(part) if self.panels else []):
            size = (PANEL_IN[0] + self._beside(), max(PANEL_IN[1], self._height(part) + 0.4))
            figure, axes = plt.subplots(figsize=size, layout="constrained")
            panel.draw(axes, looks)
            if self.ends:
                label_ends(figure, style.without(looks, DENSE))
            svg = inline(figure, prefix=f"{slug}{place}", label=panel.caption)
            pictures.append((svg, panel.caption))
        if pictures:
            lines = sorted(set(part["line"]) - {DENSE})
            shown = {line: looks[line] | dict(self.mark) for line in lines}
            legend = swatches(shown | dict(self.more), prefix=f"{slug}-l")
        shown_table = page_table(self.table(part)[1], self.caption, stem)
        return Section(slug, self.title, self.noted(part), legend, pictures, [shown_table])

    def noted(self, part: pd.DataFrame) -> str:
        """The note and the remark on the rows of one setting."""
        return " ".join(filter(None, [self.note, self.remark(part) if self.remark else ""]))


def looks_of(*parts: pd.DataFrame) -> Looks:
    """Choose the looks of the lines in frames."""
    roles = {
        str(line): str(role)
        for part in parts
        if len(part)
        for line, role in zip(part["line"], part["role"], strict=True)
        if line != DENSE
    }
    return style.looks(roles) | {DENSE: STAR}


def roles_of(part: pd.DataFrame) -> dict[str, Line2D]:
    """Make a legend that says what dashed and hollow mean; {} if all lines have one role."""
    there = set(part.loc[part["line"] != DENSE, "role"])
    if there <= {style.USUAL}:
        return {}
    look: dict[str, Any] = {"color": style.REFERENCE, "marker": "o"}
    return {
        role: Line2D([], [], **look, **own) for role, own in style.ROLES.items() if role in there
    }


WORDY = 60
"""Letters of a cell from which on its column is prose, which the page wraps."""


def _kind(column: pd.Series) -> str:
    """Class of a column in the page: numbers stand right, prose wraps."""
    if tables.numeric(column):
        return "n"
    return "w" if column.astype(str).str.len().max() > WORDY else ""


def page_table(readable: pd.DataFrame, caption: str, stem: str) -> dict[str, Any]:
    """Cut a formatted frame to `MAX_ROWS` of the page; `<stem>.*` hold the whole."""
    rows = readable.head(MAX_ROWS).astype(str)
    return {
        "caption": caption,
        "columns": [(str(name), _kind(readable[name])) for name in readable.columns],
        "rows": list(rows.itertuples(index=False, name=None)),
        "left_out": len(readable) - len(rows),
        "file": stem,
    }
