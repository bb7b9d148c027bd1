"""Which tokens are executed where: heatmaps, forecast errors by depth, and coloured text.

python analysis/routing_maps.py results_dir=results [out_dir=results/plots]

Reads `<results_dir>/<fingerprint>/routing/*.parquet`, which runners/inspect_routing.py writes.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # run the code of this clone, whichever clone's environment it is
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import html
import logging
from typing import Any, cast

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from analysis.cli import Paths, parse, run_main
from analysis.drawing import style, tables
from analysis.frames import AnalysisError, Store
from analysis.report_page.inline_svg import inline
from analysis.report_page.records import title
from analysis.view import Section, page_table

log = logging.getLogger(__name__)

BINS = 8
MAP_IN = (style.COLUMN_WIDTH_IN, 3.0)
MAX_POINTS = 6
"""Maps of the page; the files have all."""
VIEWS = {
    "position": "position in the text",
    "frequency": "frequency of the token (rare to common)",
    "dense_loss": "loss of the dense model (easy to hard)",
    "token_class": "token class",
}

PROMPT = "prompt"
TEXT_ROWS = 3
TEXT_STYLE = """body{font:15px/2 Georgia,serif;max-width:60em;margin:2em auto;color:#111}
span{padding:2px 0;border-radius:2px}.d{color:#fff}h2{font:600 14px sans-serif;margin-top:2em}
.scale span{padding:2px 8px}p.note{font:13px sans-serif;color:#444}"""
TEXT_NOTE = (
    "Shade: share of the routed units that executed the token. Point at a token for its shares by "
    "kind, its dense loss and what routing added to it."
)


def main(paths: Paths) -> None:
    """Draw maps, errors and text of every point that was inspected."""
    folders = inspected(paths.results_dir)
    if not folders:
        raise AnalysisError(
            f"no routing/ folder in {paths.results_dir}: run runners/inspect_routing.py first"
        )
    for folder in folders:
        for path in save(folder, paths.out_dir):
            log.info("wrote %s", path)


def inspected(results_dir: Path) -> list[Path]:
    """Find the `routing/` folders of a store."""
    return sorted(path.parent for path in results_dir.glob("*/routing/decisions.parquet"))


def save(folder: Path, out_dir: Path) -> list[Path]:
    """Write maps, errors, text and table of one inspected point."""
    stem = out_dir / f"routing-{folder.parent.name}"
    tokens, decisions, depth = read(folder)
    with style.paper():
        written = style.save(draw_maps(tokens, decisions), Path(f"{stem}-maps"))
        written += style.save(draw_errors(decisions, depth), Path(f"{stem}-errors"))
    text = coloured_text(tokens, decisions, title=folder.parent.name)
    written.append(tables.write(Path(f"{stem}-text.html"), text))
    shares = by_layer(decisions)
    numbers = shares.assign(fingerprint=folder.parent.name)
    return written + tables.save(Path(f"{stem}-layers"), numbers, formatted(shares))


def sections(store: Store) -> list[Section]:
    """Make a section of the page for each inspected point, `MAX_POINTS` at most."""
    folders = inspected(store.results_dir)
    if not folders:
        missing = "no point was inspected: python runners/inspect_routing.py saved=<point>/routed"
        return [Section("maps", "Routing maps", missing=missing)]
    listed: Any = store.points.itertuples()
    names = {str(point.fingerprint): title(point) for point in listed}
    found = [
        _section(folder, names.get(folder.parent.name, "point without a record"), f"map{place}")
        for place, folder in enumerate(folders[:MAX_POINTS])
    ]
    if len(folders) > MAX_POINTS:
        others = ", ".join(folder.parent.name for folder in folders[MAX_POINTS:])
        note = f"{len(folders)} points were inspected; in plots/ are also {others}"
        found.append(Section("more-maps", "More routing maps", note))
    return found


def _section(folder: Path, name: str, prefix: str) -> Section:
    tokens, decisions, _ = read(folder)
    pictures: list[tuple[Any, str]] = []
    for view, said in VIEWS.items():
        shares = executed_share(tokens, decisions, view)
        for kind in sorted(decisions["kind"].unique()):
            caption = f"{kind} by {said}"
            figure, panel = plt.subplots(figsize=MAP_IN, layout="constrained")
            shown = draw_map(panel, shares.loc[kind])
            panel.set_ylabel("layer")
            figure.colorbar(shown, ax=panel, label="share executed", fraction=0.05, pad=0.02)
            svg = inline(figure, prefix=f"{prefix}-{len(pictures)}", label=caption)
            pictures.append((svg, caption))
    stem = f"routing-{folder.parent.name}"
    units = formatted(by_layer(decisions))
    return Section(
        prefix,
        f"Routing map: {name}",
        f"{len(tokens):,} tokens; shade: share of tokens that a layer's unit executes.",
        pictures=pictures,
        files=[("The text, its tokens coloured", f"{stem}-text.html")],
        tables=[page_table(units, "Executed share of each unit and its error", f"{stem}-layers")],
    )


def read(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """The tokens, decisions and depth tables of one inspected point."""
    tokens, decisions, depth = (
        pd.read_parquet(folder / f"{name}.parquet") for name in ("tokens", "decisions", "depth")
    )
    decisions["kind"] = decisions["kind"].astype(str)
    return tokens, decisions, depth


def by_layer(decisions: pd.DataFrame) -> pd.DataFrame:
    """Executed share and mean forecast error of each site, the error also over bypassed tokens."""
    groups = decisions.groupby(["layer", "kind"])
    table = groups[["executed", "error_l2", "error_cosine"]].mean()
    bypassed = decisions[~decisions["executed"]].groupby(["layer", "kind"])
    table["error_l2_bypassed"] = bypassed["error_l2"].mean()
    table["error_cosine_bypassed"] = bypassed["error_cosine"].mean()
    return table.reset_index()


def formatted(shares: pd.DataFrame) -> pd.DataFrame:
    """Write `by_layer` for a reader."""
    columns = {
        "layer": ("layer", ""),
        "kind": ("kind", ""),
        "executed": ("executed", ".3f"),
        "error": ("error_l2", ".3f"),
        "cosine": ("error_cosine", ".3f"),
        "error, bypassed": ("error_l2_bypassed", ".3f"),
        "cosine, bypassed": ("error_cosine_bypassed", ".3f"),
    }
    return tables.formatted(shares, columns)


def binned(tokens: pd.DataFrame, view: str) -> pd.Series:
    """Each token's column in a map: bins of equal size, or the class itself.

    Tokens without a value (the first of a row has no loss) are left out as missing.
    """
    if view == "token_class":
        return tokens[view]
    values = tokens[view]
    if view == "frequency":
        values = np.log10(values)
    bins = pd.qcut(values, BINS, duplicates="drop")
    digits = 0 if view == "position" else 1 if view == "dense_loss" else 2
    ends = [(max(0.0, i.left) if digits < 2 else i.left, i.right) for i in bins.cat.categories]
    names = [f"{left:.{digits}f} to {right:.{digits}f}" for left, right in ends]
    return bins.cat.rename_categories(
        names if len(set(names)) == len(names) else [str(end) for end in ends]
    )


def executed_share(tokens: pd.DataFrame, decisions: pd.DataFrame, view: str) -> pd.DataFrame:
    """Executed share by kind and layer (rows) and bin or class (columns, in order)."""
    column = binned(tokens, view)
    merged = decisions.assign(column=column.to_numpy()[decisions["token"].to_numpy()])
    merged = merged.dropna(subset="column")
    table = merged.pivot_table(
        index=["kind", "layer"], columns="column", values="executed", observed=True
    )
    if view == "token_class":
        return table[table.mean().sort_values(ascending=False).index]
    order = [str(c) for c in getattr(column, "cat", column).categories]
    return table[[name for name in order if name in table.columns]]


def draw_maps(tokens: pd.DataFrame, decisions: pd.DataFrame) -> Figure:
    """One row of heatmaps a kind, one column a view; shade is the executed share."""
    kinds = sorted(decisions["kind"].unique())
    figure, grid = plt.subplots(
        len(kinds),
        len(VIEWS),
        figsize=(2.6 * style.COLUMN_WIDTH_IN, 2.6 * len(kinds) + 0.4),
        squeeze=False,
        sharey="row",
        layout="constrained",
    )
    shown: Any = None
    for column, (view, said) in enumerate(VIEWS.items()):
        table = executed_share(tokens, decisions, view)
        for row, kind in enumerate(kinds):
            panel: Axes = grid[row][column]
            shown = draw_map(panel, table.loc[kind])
            if column == 0:
                panel.set_ylabel(f"{kind}: layer")
            if row == 0:
                panel.set_title(said.replace(" (", "\n("))  # else neighbours overlap
    figure.colorbar(shown, ax=grid, label="share of tokens executed", fraction=0.03, pad=0.01)
    return figure


def draw_map(panel: Axes, part: pd.DataFrame) -> Any:
    """One heatmap, a row a layer, a column a bin; returns the image, for its colour bar."""
    shown = panel.imshow(
        part.to_numpy(), aspect="auto", vmin=0, vmax=1, cmap="cividis", origin="lower"
    )
    panel.grid(False)
    panel.set_xticks(range(part.shape[1]), part.columns, rotation=60, ha="right")
    step = max(1, len(part) // 6)
    panel.set_yticks(range(0, len(part), step), part.index[::step])
    return shown


def draw_errors(decisions: pd.DataFrame, depth: pd.DataFrame) -> Figure:
    """Forecast error by layer and kind, and how far the routed stream is from the dense one."""
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(2.6 * style.COLUMN_WIDTH_IN, 2.4), layout="constrained"
    )
    layers = by_layer(decisions)
    looks = style.looks(layers["kind"].unique())
    for kind, part in layers.groupby("kind"):
        look = {**looks[str(kind)], "markersize": 3}
        own = {**look, "linestyle": ":", "alpha": 0.7}
        for panel, error in ((left, "error_l2"), (middle, "error_cosine")):
            panel.plot(part["layer"], part[error], label=f"{kind}, all tokens", **look)
            panel.plot(part["layer"], part[f"{error}_bypassed"], label=f"{kind}, bypassed", **own)
    left.set_ylabel("forecast error |f - y| / |y|")
    left.set_ylim(bottom=0)
    middle.set_ylabel("cosine of forecast and output")
    right.plot(depth["layer"], depth["l2"], color=style.COLOURS[0], label="relative L2")
    apart, colour = 1 - depth["cosine"], style.COLOURS[1]
    right.plot(depth["layer"], apart, color=colour, ls="--", label="1 - cos")
    right.set_ylabel("residual stream, routed vs dense")
    right.set_ylim(bottom=0)
    right.legend(frameon=False)
    for panel in (left, middle, right):
        panel.set_xlabel("layer")
    figure.legend(*left.get_legend_handles_labels(), **style.LEGEND)
    return figure


def coloured_text(tokens: pd.DataFrame, decisions: pd.DataFrame, *, title: str) -> str:
    """A page without scripts: the prompt first, or else the first rows of the text.

    Args:
        tokens, decisions: as `runners/inspect_routing.py` writes them.
    """
    shares = decisions.pivot_table(index="token", columns="kind", values="executed", observed=True)
    overall = decisions.groupby("token")["executed"].mean()
    low, high = float(overall.quantile(0.02)), float(overall.quantile(0.98))
    scale = [low + (high - low) * step / 5 for step in range(6)]
    cells = [_span(f"{share:.0%}", share, low, high) for share in scale]
    parts = [f"<h1>{html.escape(title)}</h1><p class=note>{TEXT_NOTE}</p>"]
    parts.append(f"<p class=scale>{''.join(cells)}</p>")
    rows = [PROMPT] if (tokens["row"] == PROMPT).any() else list(tokens["row"].unique()[:TEXT_ROWS])
    for row in rows:
        spans = []
        for token in cast("Any", tokens[tokens["row"] == row].itertuples()):
            hints = [f"{kind} {value:.0%}" for kind, value in shares.loc[token.token].items()]
            if pd.notna(dense := token.dense_loss):
                hints.append(f"loss {dense:.2f}, routed {token.routed_loss - dense:+.2f}")
            text = html.escape(str(token.text)).replace("\n", "&#8629;<br>")
            spans.append(_span(text, float(overall[token.token]), low, high, "; ".join(hints)))
        parts.append(f"<h2>{html.escape(str(row))}</h2><div>{''.join(spans)}</div>")
    head = f"<meta charset=utf-8><title>{html.escape(title)}</title><style>{TEXT_STYLE}</style>"
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def _span(markup: str, share: float, low: float, high: float, hint: str = "") -> str:
    place = 0.5 if high <= low else min(1.0, max(0.0, (share - low) / (high - low)))
    mark = ' class="d"' if place < 0.45 else ""  # light text on a dark ground
    hint = f' title="{html.escape(hint)}"' if hint else ""
    colour = to_hex(colormaps["cividis"](place))
    return f'<span{mark} style="background:{colour}"{hint}>{markup}</span>'


if __name__ == "__main__":
    run_main(lambda arguments: main(parse(arguments)[0]), __doc__)
