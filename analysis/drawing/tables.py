"""Data frames as Markdown, LaTeX and CSV."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

LATEX_SPECIAL = {
    "\\": r"\textbackslash{}",
    **{c: rf"\{c}" for c in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
}


def save(stem: Path, frame: pd.DataFrame, readable: pd.DataFrame) -> list[Path]:
    """Write `<stem>.csv` in full precision, `<stem>.md` and `<stem>.tex` to read.

    Args:
        frame: the numbers.
        readable: the same, formatted for a reader.
    """
    forms = {"csv": frame.to_csv(index=False), "md": markdown(readable), "tex": latex(readable)}
    return [write(stem.parent / f"{stem.name}.{end}", text) for end, text in forms.items()]


def markdown(frame: pd.DataFrame) -> str:
    """A pipe table; numbers should be formatted already."""
    columns = [str(c) for c in frame.columns]
    lines = [_pipe(columns), _pipe(["---"] * len(columns))]
    lines += [_pipe([str(v) for v in row]) for row in frame.itertuples(index=False)]
    return "\n".join(lines) + "\n"


def latex(frame: pd.DataFrame) -> str:
    """A `tabular` with booktabs rules; text is escaped, numbers are flushed right."""
    columns = [escape(str(c)) for c in frame.columns]
    spec = "".join("r" if numeric(frame[c]) else "l" for c in frame.columns)
    rows = [
        " & ".join(escape(str(v)) for v in row) + r" \\" for row in frame.itertuples(index=False)
    ]
    head = [rf"\begin{{tabular}}{{{spec}}}", r"\toprule", " & ".join(columns) + r" \\", r"\midrule"]
    return "\n".join([*head, *rows, r"\bottomrule", r"\end{tabular}"]) + "\n"


def escape(text: str) -> str:
    """Text with LaTeX's special characters made literal."""
    return "".join(LATEX_SPECIAL.get(character, character) for character in text)


def numeric(column: pd.Series) -> bool:
    """True if every cell starts with a number: `1.2`, `1,024`, `50%`, `1.2 [1.0, 1.4]`, empty."""
    return all(_is_number(value) for value in column)


def write(path: Path, text: str) -> Path:
    """Write a text file, its folder included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _pipe(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _is_number(value: object) -> bool:
    first = (str(value).split() or ["0"])[0]
    try:
        float(first.replace(",", "").rstrip("%"))
    except ValueError:
        return False
    return True
