"""One page of everything in a store: report.html, and the figures and tables behind it.

python analysis/report.py results_dir=results [out_dir=results]

Writes `<out_dir>/report.html`, which needs no other file and sends no request, and the pictures
(PNG, PDF) and tables (CSV, Markdown, LaTeX) in `<out_dir>/plots/`.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # run the code of this clone, whichever clone's environment it is
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from analysis import (
    frames,
    kv,
    layers,
    pareto,
    routing_maps,
    significance,
    speedup,
    tradeoff,
    training_time,
)
from analysis.cli import Paths, run
from analysis.drawing import style, tables
from analysis.report_page import sections as report_sections
from analysis.report_page.data import Data, Setting, by_setting, load
from analysis.report_page.inline_svg import DARK_SERIES
from analysis.report_page.maps import inspected, map_sections
from analysis.report_page.parts import Section
from analysis.report_page.records import records_of

log = logging.getLogger(__name__)

TEMPLATES = Path(__file__).resolve().parent / "report_page" / "templates"
PLOTS = "plots"
Saved = Callable[[pd.DataFrame, str, Path], list[Path]]


def main(paths: Paths) -> None:
    """Write the page, then the files."""
    records, left_out = frames.read_all(paths.results_dir)
    data = load(records, paths.results_dir)
    parts = list(by_setting(data))
    page = paths.out_dir / "report.html"
    with style.paper():
        text = render(records, left_out, parts, paths.results_dir)
    log.info("wrote %s", tables.write(page, text))
    written = 0
    for path in save_files(parts, paths):
        log.debug("wrote %s", path)
        written += 1
    log.info("wrote %d figures and tables in %s", written, paths.out_dir / PLOTS)


def render(
    records: Sequence[frames.Record],
    left_out: Sequence[tuple[Path, str]],
    parts: Sequence[Setting],
    results_dir: Path,
) -> str:
    """The page."""
    settings = []
    for place, (slug, title, own) in enumerate(parts):
        chosen = set(own.points["fingerprint"])
        kept = [r for r in records if r["identity"]["fingerprint"] in chosen]
        settings.append(
            {
                "slug": f"s{place}",
                "title": title,
                "sections": sections(own, f"s{place}", slug),
                "records": records_of(kept, results_dir),
            }
        )
    points = frames.with_lines(frames.points(records))
    names = {
        str(row.fingerprint): f"{row.line}, target {row.sparsity_target:g}, seed {row.seed}"
        for row in points.itertuples()
    }
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(
        name=results_dir.name,
        facts=facts(records, left_out),
        settings=settings,
        maps=map_sections(inspected(results_dir), names),
        left_out=[(path.parent.name, reason) for path, reason in left_out],
        series=list(zip(style.COLOURS, DARK_SERIES, strict=True)),
        plots=PLOTS,
    )


def sections(data: Data, prefix: str, slug: str) -> list[Section]:
    """What stands under the heading of a setting."""
    looks = style.looks(set(frames.with_lines(data.points)["line"]) - {pareto.DENSE})
    found: list[Section | None] = []
    if len(data.averaged):
        shown = report_sections.tradeoff_section(data.averaged, prefix, looks, f"tradeoff-{slug}")
        found.append(shown)
        found.append(report_sections.pareto_section(data.averaged, prefix, looks, f"pareto-{slug}"))
    found.append(report_sections.training_section(data.stages, prefix, f"training_time-{slug}"))
    found.append(report_sections.speed_section(data.speed, prefix, looks, f"speedup-{slug}"))
    if len(data.measured):
        found.append(report_sections.kv_section(data.measured, prefix, looks, f"kv-{slug}"))
    found.append(report_sections.layers_section(data.layers, prefix, looks, f"layers-{slug}"))
    stem = f"significance-{slug}"
    found.append(report_sections.significance_section(data.compared, prefix, stem))
    return [section for section in found if section is not None]


def facts(
    records: Sequence[frames.Record], left_out: Sequence[tuple[Path, str]]
) -> list[tuple[str, str]]:
    """What was read, and what it was made with."""
    identities = [record["identity"] for record in records]
    commits = {(i.get("git") or {}).get("commit") for i in identities}
    listed: dict[str, Any] = {
        "complete records": len(records),
        "left out": len(left_out),
        "methods": _joined(record["method"] for record in records),
        "devices": _joined(i.get("device") for i in identities),
        "commits": _joined(commit and commit[:12] for commit in commits),
        "torch": _joined((i.get("packages") or {}).get("torch") for i in identities),
    }
    return [(key, str(value)) for key, value in listed.items() if value != ""]


def _joined(values: Any) -> str:
    return ", ".join(sorted({str(value) for value in values if value}))


def save_files(parts: Sequence[Setting], paths: Paths) -> Iterator[Path]:
    """Figures and tables of every section, as the modules' own commands write them."""
    out = paths.out_dir / PLOTS
    for slug, title, own in parts:
        named: list[tuple[str, Saved, pd.DataFrame]] = [
            ("tradeoff", tradeoff.save, own.averaged),
            ("pareto", pareto.save, own.averaged),
            ("training_time", training_time.save, own.stages),
            ("speedup", speedup.save, own.speed),
            ("kv", kv.save, kv.routed_perplexities(own.measured)),
            ("layers", layers.save, own.layers),
            ("significance", significance.save, own.compared),
        ]
        for name, save, rows in named:
            if len(rows):
                yield from save(rows, title, out / f"{name}-{slug}")
    for folder in inspected(paths.results_dir):
        yield from routing_maps.save(folder, out)


if __name__ == "__main__":
    run(main, __doc__, out="")
