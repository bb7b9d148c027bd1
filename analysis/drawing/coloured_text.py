"""Text whose tokens are coloured by the share of units that executed them, as one HTML page."""

from __future__ import annotations

import html
from typing import Any

import pandas as pd
from matplotlib import colormaps
from matplotlib.colors import to_hex

PROMPT = "prompt"
MAX_ROWS = 3
STYLE = """body{font:15px/2 Georgia,serif;max-width:60em;margin:2em auto;color:#111}
span{padding:2px 0;border-radius:2px}.d{color:#fff}h2{font:600 14px sans-serif;margin-top:2em}
.scale span{padding:2px 8px}p.note{font:13px sans-serif;color:#444}"""
NOTE = (
    "Shade: share of the routed units that executed the token. Point at a token for its shares by "
    "kind, its dense loss and what routing added to it."
)


def page(tokens: pd.DataFrame, decisions: pd.DataFrame, *, title: str) -> str:
    """A page without scripts: the prompt first, or else the first rows of the text.

    Args:
        tokens, decisions: as `runners/inspect_routing.py` writes them.
    """
    shares = decisions.pivot_table(index="token", columns="kind", values="executed", observed=True)
    overall = decisions.groupby("token")["executed"].mean()
    low, high = float(overall.quantile(0.02)), float(overall.quantile(0.98))
    rows = [PROMPT] if (tokens["row"] == PROMPT).any() else list(tokens["row"].unique()[:MAX_ROWS])
    parts = [f"<h1>{html.escape(title)}</h1><p class=note>{NOTE}</p>", _scale(low, high)]
    for row in rows:
        listed: Any = tokens[tokens["row"] == row].itertuples()
        spans = [
            _span(token, float(overall[token.token]), shares.loc[token.token], low, high)
            for token in listed
        ]
        parts.append(f"<h2>{html.escape(str(row))}</h2><div>{''.join(spans)}</div>")
    head = f"<meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def _colour(share: float, low: float, high: float) -> tuple[str, bool]:
    """Background, and whether it is dark."""
    place = 0.5 if high <= low else min(1.0, max(0.0, (share - low) / (high - low)))
    return to_hex(colormaps["cividis"](place)), place < 0.45


def _span(token: Any, share: float, kinds: pd.Series, low: float, high: float) -> str:
    colour, dark = _colour(share, low, high)
    text = str(token.text)
    dense, routed = token.dense_loss, token.routed_loss
    hints = [f"{kind} {value:.0%}" for kind, value in kinds.items()]
    if pd.notna(dense):
        hints.append(f"loss {dense:.2f}, routed {routed - dense:+.2f}")
    shown = html.escape(text).replace("\n", "&#8629;<br>")
    hint = html.escape("; ".join(hints))
    mark = " class=d" if dark else ""
    return f'<span{mark} style="background:{colour}" title="{hint}">{shown}</span>'


def _scale(low: float, high: float) -> str:
    cells = []
    for step in range(6):
        share = low + (high - low) * step / 5
        colour, dark = _colour(share, low, high)
        mark = " class=d" if dark else ""
        cells.append(f'<span{mark} style="background:{colour}">{share:.0%}</span>')
    return f"<p class=scale>{''.join(cells)}</p>"
