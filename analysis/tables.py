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


def markdown(frame: pd.DataFrame) -> str:
    """A pipe table; numbers should be formatted already."""
    columns = [str(c) for c in frame.columns]
    lines = [_pipe(columns), _pipe(["---"] * len(columns))]
    lines += [_pipe([str(v) for v in row]) for row in frame.itertuples(index=False)]
    return "\n".join(lines) + "\n"


def latex(frame: pd.DataFrame) -> str:
    """A `tabular` with booktabs rules; text is escaped."""
    columns = [escape(str(c)) for c in frame.columns]
    numeric = [all(_is_number(v) for v in frame[c]) for c in frame.columns]
    spec = "".join("r" if right else "l" for right in numeric)
    rows = [
        " & ".join(escape(str(v)) for v in row) + r" \\" for row in frame.itertuples(index=False)
    ]
    head = [rf"\begin{{tabular}}{{{spec}}}", r"\toprule", " & ".join(columns) + r" \\", r"\midrule"]
    return "\n".join([*head, *rows, r"\bottomrule", r"\end{tabular}"]) + "\n"


def escape(text: str) -> str:
    """Text with LaTeX's special characters made literal."""
    return "".join(LATEX_SPECIAL.get(character, character) for character in text)


def write(path: Path, text: str) -> Path:
    """Write a text file, its folder included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _pipe(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _is_number(value: object) -> bool:
    try:
        float(str(value).replace(",", "").rstrip("%") or "0")
    except ValueError:
        return False
    return True
