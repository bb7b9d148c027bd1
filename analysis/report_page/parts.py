"""What a report is made of: sections of pictures and tables, ready for the template."""

from __future__ import annotations

from dataclasses import dataclass, field

import pandas as pd
from markupsafe import Markup

from analysis.drawing import tables

MAX_ROWS = 250
"""Rows of a table that the page shows; the files beside it hold all."""


@dataclass(frozen=True)
class Picture:
    """One panel."""

    svg: Markup
    caption: str


@dataclass(frozen=True)
class Table:
    """Formatted cells."""

    caption: str
    columns: list[tuple[str, bool]]
    """(name, whether it holds numbers)."""
    rows: list[tuple[str, ...]]
    left_out: int = 0
    file: str = ""
    """Stem of the files that hold the whole table."""


@dataclass(frozen=True)
class Section:
    """A heading with what stands below it."""

    slug: str
    title: str
    note: str = ""
    legend: list[tuple[str, Markup]] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    missing: str = ""
    """The command that fills an empty section."""


def table(readable: pd.DataFrame, caption: str, file: str) -> Table:
    """A formatted frame, cut to `MAX_ROWS`."""
    columns = [(str(c), tables.numeric(readable[c])) for c in readable.columns]
    shown = readable.head(MAX_ROWS)
    rows = [tuple(str(cell) for cell in row) for row in shown.itertuples(index=False)]
    return Table(caption, columns, rows, len(readable) - len(shown), file)
