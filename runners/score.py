"""Evaluate a saved routed model, at its own threshold or moved to another sparsity.

python runners/score.py saved=results/<fingerprint>/routed sparsity=0.4
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # run the code of this clone, whichever clone's environment it is
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import hydra
from omegaconf import DictConfig

from runners.job import run_point
from runners.launching.command_line import launch


@hydra.main(config_path="../conf", config_name="score", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Hydra entry."""
    run_point(cfg, "score")


if __name__ == "__main__":
    launch(main, "score")
