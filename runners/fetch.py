"""Fill a folder for `eval.data_dir` on a machine that has a network, for one that has none.

python runners/fetch.py out_dir=./eval_data eval=paper

Writes `<task or text>/<split>.jsonl` with the hub's own fields, and `manifest.json` with the data
set, its revision, the number of records and the sha256 of each file.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run the code of this clone, whichever clone's environment it is
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import hydra
from omegaconf import DictConfig, OmegaConf

from runners.evaluation.fetching import check_fetch, fetch
from runners.launching.command_line import launch, one_line_errors
from runners.options import parse_section
from runners.point_config import EvalConfig
from runners.runtime.signals import listening


@hydra.main(config_path="../conf", config_name="fetch", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Hydra entry."""
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    with one_line_errors(), listening():
        fetch(*_asked(config), Path(config["out_dir"]).expanduser())


def _asked(config: Mapping[str, Any]) -> tuple[EvalConfig, Mapping[str, str]]:
    return parse_section(EvalConfig, config["eval"]), config["revisions"] or {}


if __name__ == "__main__":
    launch(main, "fetch", lambda config: check_fetch(*_asked(config)))
