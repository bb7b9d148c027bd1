"""Command line of the analysis scripts: `key=value`, as Hydra's, with one-line errors."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)


class AnalysisError(ValueError):
    """A mistake of the user; its text is one line."""


@dataclass(frozen=True)
class Paths:
    """Where to read and where to write."""

    results_dir: Path
    out_dir: Path


def parse(arguments: Sequence[str], out: str = "plots") -> Paths:
    """Read `results_dir=results out_dir=<results_dir>/<out>`, both optional.

    Raises:
        AnalysisError: an unknown key or no such folder.
    """
    values = {"results_dir": "results"}
    for word in arguments:
        key, separator, value = word.partition("=")
        if not separator or key not in ("results_dir", "out_dir"):
            raise AnalysisError(f"unknown argument {word!r}; known: results_dir=, out_dir=")
        values[key] = value
    results = Path(values["results_dir"]).expanduser()
    if not results.is_dir():
        raise AnalysisError(f"results_dir={results} is not a folder; run runners/sweep.py first")
    return Paths(results, Path(values.get("out_dir", results / out)).expanduser())


def run(main: Callable[[Paths], None], usage: str | None, *, out: str = "plots") -> None:
    """Run a script's main function; exit 2 with one line on a user's mistake.

    Args:
        out: where it writes by default, below the results.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    logging.getLogger("fontTools").setLevel(logging.WARNING)
    if {"-h", "--help"} & set(sys.argv[1:]):
        sys.stdout.write(f"{usage}\n")
        return
    try:
        main(parse(sys.argv[1:], out))
    except (AnalysisError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
