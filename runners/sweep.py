"""Run one point, or with `-m` a sweep: train, calibrate, evaluate, record.

python runners/sweep.py method=informed sparsity=0.3,0.5,0.7 -m
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # run the code of this clone, whichever clone's environment it is
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import hydra
from omegaconf import DictConfig

from runners.job import calibration_loss, run_point
from runners.launching.command_line import launch


@hydra.main(config_path="../conf", config_name="sweep", version_base="1.3")
def main(cfg: DictConfig) -> float | None:
    """Hydra entry; one call per point.

    Returns:
        With `tune=true` what a search minimises.
    """
    if cfg.tune:
        return calibration_loss(cfg)
    run_point(cfg, "sweep")
    return None


if __name__ == "__main__":
    launch(main, "sweep")
