"""Time a routed model against the dense one, in one process, under one attention backend.

python runners/speed.py method=informed sparsity=0.5
python runners/speed.py model=llama3_1_8b_shape speed.decisions=random speed.trained=false
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # run the code of this clone, whichever clone's environment it is
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import hydra
from omegaconf import DictConfig

from runners.job import measure_speed
from runners.launching.command_line import launch


@hydra.main(config_path="../conf", config_name="sweep", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Hydra entry; one call per point."""
    measure_speed(cfg)


if __name__ == "__main__":
    launch(main, "sweep")
