"""What a sweep would do and take, before anything runs: `runners/sweep.py`'s words and a device.

python runners/plan.py method=informed sparsity=0.3,0.5,0.7 hardware=h100 -m
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # run the code of this clone, whichever clone's environment it is
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import logging

from runners.errors import UserError
from runners.launching.check import check_point
from runners.launching.command_line import version
from runners.launching.points import CommandLine


def main(arguments: list[str]) -> None:
    """Print the plan of every point and of all.

    Raises:
        UserError: one line.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    points = [check_point(config) for config in CommandLine(arguments, "plan").points()]
    from runners.planning.estimate import Planner, to_json
    from runners.planning.table import table
    from runners.runtime.progress import progress
    from runners.store.files import write_json_atomic

    hardware, options = points[0].resolved["hardware"], points[0].resolved["plan"]
    planner = Planner(hardware, options)
    planned = [planner.point(config) for config in progress(points, "plan")]
    sys.stdout.write(table(planned, hardware, options) + "\n")
    if options["json"] is not None:
        write_json_atomic(Path(options["json"]), to_json(planned, hardware))


if __name__ == "__main__":
    try:
        if {"--help", "-h"} & set(sys.argv):
            sys.stdout.write(f"{__doc__}\nIts options: conf/plan.yaml\n")
        elif "--version" in sys.argv:
            sys.stdout.write(f"{version()}\n")
        else:
            main(sys.argv[1:])
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
