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
from collections.abc import Iterable
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from analysis import (
    equal_flops,
    generation,
    kv,
    layers,
    pareto,
    routing_maps,
    significance,
    speedup,
    tradeoff,
    training_time,
    verdict,
)
from analysis.cli import Paths, parse, run_main
from analysis.drawing import style, tables
from analysis.frames import Store, by_setting
from analysis.report_page.answers import answers, measured_on
from analysis.report_page.records import records_of
from analysis.view import View, looks_of

log = logging.getLogger(__name__)

SCRIPTS = (
    verdict,
    equal_flops,
    tradeoff,
    pareto,
    generation,
    training_time,
    speedup,
    kv,
    layers,
    significance,
)
VIEWS: tuple[View, ...] = (*(script.VIEW for script in SCRIPTS), training_time.CURVE)
"""What a report shows of a setting, in this order."""
OPTIONAL = (kv.VIEW, training_time.CURVE)
"""Where there is nothing to be seen of these, nothing is missing."""
TEMPLATES = Path(__file__).resolve().parent / "report_page" / "templates"
PLOTS = "plots"


def main(paths: Paths) -> None:
    """Write the page, then the files as the views' own scripts write them."""
    store = Store(paths.results_dir)
    rows = {view: view.rows(store) for view in VIEWS}
    with style.paper():
        text = render(store, rows)
    log.info("wrote %s", tables.write(paths.out_dir / "report.html", text))
    out, written = paths.out_dir / PLOTS, []
    for view, own in rows.items():
        for slug, title, part in by_setting(own):
            written += view.save(part, title, out / f"{view.name}-{slug}")
    for folder in routing_maps.inspected(paths.results_dir):
        written += routing_maps.save(folder, out)
    log.info("wrote %d figures and tables in %s", len(written), out)


def render(store: Store, rows: dict[View, pd.DataFrame]) -> str:
    """Write the page from the rows of each view."""
    settings = []
    by_name = {str(record["identity"]["fingerprint"]): record for record in store.records}
    for place, (slug, title, points) in enumerate(by_setting(store.points)):
        parts = {view: of_setting(own, title) for view, own in rows.items()}
        looks = looks_of(*parts.values())
        sections = [
            view.section(part, f"s{place}", looks, f"{view.name}-{slug}")
            for view, part in parts.items()
            if len(part) or view not in OPTIONAL
        ]
        said, by = answers(parts[verdict.VIEW], parts[equal_flops.VIEW])
        own = [by_name[name] for name in points["fingerprint"]]
        setting = {"slug": f"s{place}", "title": title, "sections": sections}
        setting |= {"answers": said, "answered_by": by, "measured_on": measured_on(own)}
        settings.append({**setting, "records": records_of(store, points)})
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(
        name=store.results_dir.name,
        facts=facts(store),
        settings=settings,
        maps=routing_maps.sections(store),
        left_out=[(path.parent.name, reason) for path, reason in store.left_out],
        plots=PLOTS,
    )


def of_setting(rows: pd.DataFrame, title: str) -> pd.DataFrame:
    """Cut a view's rows to one setting."""
    return rows[rows["setting"] == title] if len(rows) else rows


def facts(store: Store) -> list[tuple[str, str]]:
    """Say what was read, and what it was made with."""
    identities = [record["identity"] for record in store.records]
    commits = {(i.get("git") or {}).get("commit") for i in identities}
    listed = {
        "complete records": str(len(store.records)),
        "left out": str(len(store.left_out)),
        "methods": _joined(record["method"] for record in store.records),
        "devices": _joined(i.get("device") for i in identities),
        "commits": _joined(commit and commit[:12] for commit in commits),
        "torch": _joined((i.get("packages") or {}).get("torch") for i in identities),
    }
    return [(key, value) for key, value in listed.items() if value]


def _joined(values: Iterable[Any]) -> str:
    return ", ".join(sorted({str(value) for value in values if value}))


if __name__ == "__main__":
    run_main(lambda arguments: main(parse(arguments, "")[0]), __doc__)
