"""Data frames as Markdown, LaTeX and CSV."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd


def save(stem: Path, frame: pd.DataFrame, readable: pd.DataFrame, note: str = "") -> list[Path]:
    """Write `<stem>.csv` in full precision, `<stem>.md` and `<stem>.tex` to read.

    Args:
        frame: the numbers.
        readable: the same, formatted for a reader.
        note: stands below the table in Markdown.
    """
    forms = {"csv": frame.to_csv(index=False), "md": markdown(readable), "tex": latex(readable)}
    forms["md"] += f"\n{note}\n" if note else ""
    return [write(stem.parent / f"{stem.name}.{end}", text) for end, text in forms.items()]


def formatted(frame: pd.DataFrame, columns: Mapping[str, tuple[str, str]]) -> pd.DataFrame:
    """Write numbers for a reader; a missing one is an empty cell.

    Args:
        columns: (column of the frame, its format) by heading.
    """
    return pd.DataFrame(
        {
            heading: ["" if pd.isna(value) else format(value, spec) for value in frame[column]]
            for heading, (column, spec) in columns.items()
        }
    )


def known(number: float) -> str:
    """Write a share; an empty cell if it is missing."""
    return "" if pd.isna(number) else f"{number:.3f}"


def figure(row: Any, value: str = "value") -> str:
    """Write a measure with its interval: `80.00 [72.00, 88.00]`, `0.550 ± 0.020`.

    Args:
        row: with `measure`, `low`, `high` and the value's own name.
    """
    number = getattr(row, value)
    if row.measure != "perplexity":
        return f"{number:.3f}" + ("" if pd.isna(row.low) else f" ± {(row.high - row.low) / 2:.3f}")
    return f"{number:.2f}" + ("" if pd.isna(row.low) else f" [{row.low:.2f}, {row.high:.2f}]")


def against_dense(row: Any) -> str:
    """Write a measure against the dense model's with its paired interval.

    `1.540 [1.410, 1.710]` of a perplexity (their ratio), `-0.100 [-0.170, -0.020]` of an accuracy.

    Args:
        row: of `Store.averaged`, or with the same columns.
    """
    if row.measure == "perplexity":
        return interval((row.ratio, row.ratio_low, row.ratio_high), ".3f")
    return interval((row.difference, row.difference_low, row.difference_high), "+.3f")


def interval(found: tuple[float, float, float], spec: str) -> str:
    """Write a value with its interval, unless that is missing or of no width.

    A missing value is an empty cell.
    """
    value, low, high = found
    if pd.isna(value):
        return ""
    return f"{value:{spec}}" + ("" if not low < high else f" [{low:{spec}}, {high:{spec}}]")


def markdown(frame: pd.DataFrame) -> str:
    """Write a pipe table."""
    columns = [str(c) for c in frame.columns]
    lines = [_pipe(columns), _pipe(["---"] * len(columns))]
    lines += [_pipe([str(v) for v in row]) for row in frame.itertuples(index=False)]
    return "\n".join(lines) + "\n"


def latex(frame: pd.DataFrame) -> str:
    """Write a `tabular` with booktabs rules; text is escaped, numbers are flushed right."""
    spec = "".join("r" if numeric(frame[c]) else "l" for c in frame.columns)
    return frame.to_latex(index=False, escape=True, column_format=spec)


def numeric(column: pd.Series) -> bool:
    """Whether every cell starts with a number: `1.2`, `1,024`, `50%`, `1.2 [1.0, 1.4]`, empty."""
    first = column.astype(str).str.split().str[0].fillna("0").str.replace(",", "").str.rstrip("%")
    return bool(pd.to_numeric(first, errors="coerce").notna().all())


def write(path: Path, text: str) -> Path:
    """Write a text file, its folder included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _pipe(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"
