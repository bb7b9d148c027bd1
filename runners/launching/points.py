"""The points of a sweep as Hydra's own sweeper would number them, each a resolved config."""

from __future__ import annotations

from collections.abc import Sequence

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.errors import HydraException

from runners.errors import UserError
from runners.launching.command_line import parse, split_flags
from runners.point_config import CONF, PointConfig, resolve


def configs(arguments: Sequence[str]) -> list[PointConfig]:
    """Config of every point as `runners/sweep.py` would see it.

    Args:
        arguments: of the command, checked by `launch.prepare`.

    Raises:
        UserError: a point that could not run.
    """
    flags, words = split_flags(arguments)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        try:
            points = _expanded(words, sweeping=bool({"-m", "--multirun"} & set(flags)))
            composed = [compose("plan", overrides=point) for point in points]
        except HydraException as error:
            raise UserError(" ".join(str(error).split())) from error
    return [PointConfig.parse(resolve(cfg)) for cfg in composed]


def _expanded(words: list[str], *, sweeping: bool) -> list[list[str]]:
    single = [str(o.input_line) for o in parse(words) if not o.is_sweep_override()]
    hydra = compose("plan", overrides=single, return_hydra_config=True).hydra
    if not sweeping and str(hydra.mode).rpartition(".")[2] != "MULTIRUN":
        return [words]
    lists = [f"{key}={value}" for key, value in (hydra.sweeper.params or {}).items()]
    batches = BasicSweeper.split_arguments(parse([*lists, *words]), None)
    return [list(point) for batch in batches for point in batch]
