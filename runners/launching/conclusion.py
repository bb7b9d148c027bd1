"""What a sweep ends with: a table of its points, and the paths of picture and report."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from runners.runtime.progress import Bar
from runners.store.run_folder import RunFolder, sizes

ROOT = Path(__file__).resolve().parents[2]
REPORT, PICTURES = "report.html", "tradeoff-*.png"

log = logging.getLogger(__name__)


def conclude(folders: Sequence[str], *, report: bool) -> None:
    """Show the points of a sweep, and write the report of their results where it lacks one.

    Args:
        folders: of points that have a record, complete or failed.
        report: whether one is written.
    """
    found = [RunFolder(Path(folder)) for folder in dict.fromkeys(folders)]
    records = [record for folder in found if (record := folder.result())]
    if len(records) < 2:
        return
    said = "the sweep's %d points; FLOPs as a share of dense, in brackets the dense model:\n%s"
    log.info(said, len(records), table(records))
    complete = [folder.result_file for folder in found if folder.is_complete()]
    if report and complete:
        _write_report(found[0].path.parent, max(file.stat().st_mtime for file in complete))


def table(records: Iterable[Mapping[str, Any]]) -> str:
    """One line a point: what it realised, its quality with the dense model's, what it saves."""
    import pandas as pd

    rows = [_row(record) for record in records]
    return pd.DataFrame(rows).fillna("").to_string(index=False)


def _row(record: Mapping[str, Any]) -> dict[str, Any]:
    words = [record["method"], record.get("variant")]
    row = {
        "method": " ".join(filter(None, words)),
        "target": f"{record['sparsity_target']:g}",
        "seed": record["seed"],
    }
    if record["status"] != "complete":
        return {**row, "realised": record["status"]}
    row["realised"] = f"{record['sparsity_realised']:.3f}"
    row["FLOPs"] = f"{record['flops_ratio']:.3f}"
    for kind, digits in (("perplexity", 2), ("accuracy", 3)):
        for name, entry in record[kind].items():
            own, dense = entry["value"], entry["dense"]
            row[name] = f"{own:.{digits}f} ({dense:.{digits}f})"
    for phase, cases in (record.get("speed") or {}).items():
        for case in cases:
            row[f"{phase} {sizes(case)}"] = f"x{case['speedup']:.2f}"
    return row


def _write_report(results: Path, changed: float) -> None:
    """Have `analysis/report.py` write page and pictures, unless they are newer than the records."""
    page = results / REPORT
    if not page.is_file() or page.stat().st_mtime < changed:
        script = [sys.executable, str(ROOT / "analysis" / "report.py"), f"results_dir={results}"]
        with Bar(desc="report of all results"):
            done = subprocess.run(script, capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["no reason given"]
            log.warning("no report: %s", said[-1])
            return
    for picture in sorted((results / "plots").glob(PICTURES)):
        log.info("picture: %s", picture)
    log.info("report: %s", page)
