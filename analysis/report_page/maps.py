"""Routing maps of the inspected points, as a section of the report."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from markupsafe import Markup
from matplotlib import pyplot as plt

from analysis import routing_maps
from analysis.drawing import style
from analysis.report_page.inline_svg import inline
from analysis.report_page.parts import Picture, Section, table

MAX_POINTS = 6
MAP_IN = (style.COLUMN_WIDTH_IN, 3.0)


def inspected(results_dir: Path) -> list[Path]:
    """The `routing/` folders of a store."""
    return sorted(path.parent for path in results_dir.glob("*/routing/decisions.parquet"))


def map_sections(folders: list[Path], names: dict[str, str]) -> list[Section]:
    """One section a point, `MAX_POINTS` at most.

    Args:
        names: label of each fingerprint that has a record.
    """
    if not folders:
        missing = "no point was inspected: python runners/inspect_routing.py saved=<point>/routed"
        return [Section("maps", "Routing maps", missing=missing)]
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
    tokens, decisions, _ = routing_maps.read(folder)
    pictures: list[Picture] = []
    for view, title in routing_maps.VIEWS.items():
        shares = routing_maps.executed_share(tokens, decisions, view)
        for kind in sorted(decisions["kind"].unique()):
            caption = f"{kind} by {title}"
            svg = _map(shares.loc[kind], caption, f"{prefix}-{len(pictures)}")
            pictures.append(Picture(svg, caption))
    by_layer = routing_maps.formatted(routing_maps.by_layer(decisions))
    stem = f"routing-{folder.parent.name}-layers"
    return Section(
        prefix,
        f"Routing map: {name}",
        f"{len(tokens):,} tokens; shade: share of tokens that a layer's unit executes. The text "
        f"with its tokens coloured is plots/routing-{folder.parent.name}-text.html.",
        pictures=pictures,
        tables=[table(by_layer, "Executed share and forecast error of each unit", stem)],
    )


def _map(part: pd.DataFrame, caption: str, prefix: str) -> Markup:
    figure, panel = plt.subplots(figsize=MAP_IN, layout="constrained")
    shown = routing_maps.draw_map(panel, part)
    panel.set_ylabel("layer")
    figure.colorbar(shown, ax=panel, label="share executed", fraction=0.05, pad=0.02)
    return inline(figure, prefix=prefix, label=caption)
