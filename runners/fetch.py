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
from runners.launching.check import check_writable
from runners.launching.command_line import launch, one_line_errors
from runners.options import parse_section, parse_value
from runners.point_config import EvalConfig
from runners.runtime.signals import listening


@hydra.main(config_path="../conf", config_name="fetch", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Hydra entry."""
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    with one_line_errors(), listening():
        settings, revisions, folder = _asked(config)
        fetch(settings, revisions, folder)


def _asked(config: Mapping[str, Any]) -> tuple[EvalConfig, Mapping[str, str], Path]:
    settings = parse_section(EvalConfig, config["eval"])
    revisions = parse_value(Mapping[str, str] | None, config["revisions"], "revisions")
    folder = parse_value(str, config["out_dir"], "out_dir")
    return settings, revisions or {}, Path(folder).expanduser()


def _check(config: Mapping[str, Any]) -> None:
    settings, revisions, folder = _asked(config)
    check_fetch(settings, revisions)
    check_writable("out_dir", str(folder))


if __name__ == "__main__":
    launch(main, "fetch", _check)
