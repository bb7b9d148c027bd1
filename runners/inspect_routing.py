"""Record which tokens a saved routed model executes, and what its forecasts miss.

python runners/inspect_routing.py saved=results/<fingerprint>/routed prompt="The king of France"
python analysis/routing_maps.py results_dir=results
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # run the code of this clone, whichever clone's environment it is
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import hydra
from omegaconf import DictConfig

from runners.inspection.tables import record_routing
from runners.launching.command_line import launch, one_line_errors
from runners.point_config import PointConfig, resolve


@hydra.main(config_path="../conf", config_name="inspect_routing", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Hydra entry."""
    with one_line_errors():
        record_routing(PointConfig.parse(resolve(cfg)))


if __name__ == "__main__":
    launch(main, "inspect_routing")
