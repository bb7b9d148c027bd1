"""What a sweep would do and take, before anything runs: `runners/sweep.py`'s words and a device.

python runners/plan.py method=informed sparsity=0.3,0.5,0.7 hardware=h100 -m
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from runners.errors import UserError
from runners.launch import prepare
from runners.plan_points import configs


def main(arguments: list[str]) -> None:
    """Print the plan of every point and of all.

    Raises:
        UserError: one line.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    points = configs(prepare(arguments, "plan"))
    from runners.disk import write_json_atomic
    from runners.plan_table import table
    from runners.planning import Planner, to_json
    from runners.progress import progress

    hardware, options = points[0][1]
    planner = Planner(hardware, options)
    planned = [planner.point(config) for config, _ in progress(points, "plan")]
    sys.stdout.write(table(planned, hardware, options) + "\n")
    if options["json"] is not None:
        write_json_atomic(Path(options["json"]), to_json(planned, hardware))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
