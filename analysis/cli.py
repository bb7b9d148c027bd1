"""Command line of the analysis scripts: `key=value`, as Hydra's, with one-line errors."""

from __future__ import annotations

import difflib
import logging
import sys
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from analysis.frames import AnalysisError, Store, by_setting
from analysis.view import View

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Paths:
    """Where to read and where to write."""

    results_dir: Path
    out_dir: Path


def parse(
    arguments: Sequence[str], out: str = "plots", **more: str
) -> tuple[Paths, dict[str, str]]:
    """Read `results_dir=results out_dir=<results_dir>/<out>` and a script's own keys.

    Args:
        more: the script's own keys, with their defaults.

    Returns:
        the folders, and the script's own values.

    Raises:
        AnalysisError: an unknown key, or no such results.
    """
    values = {"results_dir": "results", **more}
    known = ("results_dir", "out_dir", *more)
    for word in arguments:
        key, separator, value = word.partition("=")
        if not separator or key not in known:
            listed = ", ".join(f"{name}=" for name in known)
            nearest = difflib.get_close_matches(key, known, n=1)
            hint = f" (did you mean {nearest[0]}=?)" if nearest else ""
            raise AnalysisError(f"unknown argument {word!r}{hint}; known: {listed}")
        values[key] = value
    results = Path(values["results_dir"]).expanduser()
    if not results.is_dir():
        raise AnalysisError(f"results_dir={results} is not a folder; run runners/sweep.py first")
    folder = Path(values.get("out_dir", results / out)).expanduser()
    return Paths(results, folder), {key: values[key] for key in more}


def write(view: View, paths: Paths, *, optional: bool = False) -> None:
    """Write the files of a view, for each setting of the store.

    Raises:
        AnalysisError: the store has nothing that it shows, and it is not optional.
    """
    rows = view.rows(Store(paths.results_dir))
    if rows.empty and not optional:
        raise AnalysisError(f"nothing to show in {paths.results_dir}: {view.missing}")
    for slug, title, part in by_setting(rows):
        for path in view.save(part, title, paths.out_dir / f"{view.name}-{slug}"):
            log.info("wrote %s", path)
            if view.printed and path.suffix == ".md":
                sys.stdout.write(f"{title}\n\n{path.read_text(encoding='utf-8')}\n")


def run(view: View, usage: str | None) -> None:
    """Run the script of a view."""
    run_main(lambda arguments: write(view, parse(arguments)[0]), usage)


def run_main(main: Callable[[Sequence[str]], None], usage: str | None) -> None:
    """Run a script's main function; exit 2 with one line on a user's mistake."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    logging.getLogger("fontTools").setLevel(logging.WARNING)
    if {"-h", "--help"} & set(sys.argv[1:]):
        sys.stdout.write(f"{usage}\n")
        return
    if "--version" in sys.argv[1:]:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        sys.stdout.write(f"{project['name']} {project['version']}\n")
        return
    try:
        main(sys.argv[1:])
    except (AnalysisError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
