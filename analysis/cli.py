"""Command line of the analysis scripts: `key=value`, as Hydra's, with one-line errors."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
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
    return paths_of(words(arguments, {}), out)


def words(arguments: Sequence[str], more: Mapping[str, str]) -> dict[str, str]:
    """`key=value` arguments: the two folders, and a script's own keys with their defaults.

    Raises:
        AnalysisError: an unknown key.
    """
    values = {"results_dir": "results", **more}
    known = ("results_dir", "out_dir", *more)
    for word in arguments:
        key, separator, value = word.partition("=")
        if not separator or key not in known:
            listed = ", ".join(f"{name}=" for name in known)
            raise AnalysisError(f"unknown argument {word!r}; known: {listed}")
        values[key] = value
    return values


def paths_of(values: Mapping[str, str], out: str) -> Paths:
    """The folders that the arguments name.

    Raises:
        AnalysisError: no such results.
    """
    results = Path(values["results_dir"]).expanduser()
    if not results.is_dir():
        raise AnalysisError(f"results_dir={results} is not a folder; run runners/sweep.py first")
    return Paths(results, Path(values.get("out_dir", results / out)).expanduser())


def run(main: Callable[[Paths], None], usage: str | None, *, out: str = "plots") -> None:
    """`run_words` for a script that only needs the two folders, the second below the first."""
    run_words(lambda arguments: main(parse(arguments, out)), usage)


def run_words(main: Callable[[Sequence[str]], None], usage: str | None) -> None:
    """Run a script's main function; exit 2 with one line on a user's mistake."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    logging.getLogger("fontTools").setLevel(logging.WARNING)
    if {"-h", "--help"} & set(sys.argv[1:]):
        sys.stdout.write(f"{usage}\n")
        return
    try:
        main(sys.argv[1:])
    except (AnalysisError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
