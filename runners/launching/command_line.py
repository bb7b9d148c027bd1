"""From the command line to Hydra: mistakes are found here, before anything heavy loads."""

from __future__ import annotations

import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from runners.errors import UserError
from runners.launching.check import check_point
from runners.launching.ray_launcher import register
from runners.point_config import CONF, resolve
from runners.runtime.processes import is_main_process, world_size
from runners.runtime.workers import collected_failures, note_failure, passing_on

ROOT = Path(__file__).resolve().parents[2]
FLAGS_WITH_VALUE = {"--config-name", "-cn", "--config-path", "-cp", "--config-dir", "-cd"}
MAX_CHECKED_POINTS = 256
LAUNCHERS = {
    "basic": None,
    "joblib": ("hydra_plugins.hydra_joblib_launcher", "hydra-joblib-launcher"),
    "submitit_local": ("hydra_plugins.hydra_submitit_launcher", "hydra-submitit-launcher"),
    "submitit_slurm": ("hydra_plugins.hydra_submitit_launcher", "hydra-submitit-launcher"),
    "ray": ("ray", "ray"),
}
"""Values of hydra/launcher, and what a value needs beside ours: a module, and its package."""

Check = Callable[[dict[str, Any]], None]


def launch(entry: Callable[[], Any], config_name: str, check: Check = check_point) -> None:
    """Check the arguments, run a Hydra entry; exit 2 on a user's mistake, 1 on a failed point.

    Args:
        check: of each composed config; raises UserError.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    inherited = os.environ.get("PYTHONPATH")  # launchers' processes run this clone's code too
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([inherited] if inherited else [])])
    try:
        if not {"--help", "-h", "--hydra-help", "--version", "--cfg", "-c"} & set(sys.argv[1:]):
            sys.argv[1:] = prepare(sys.argv[1:], config_name, check)
        with collected_failures() as failed, passing_on():
            entry()
    except UserError as error:
        sys.exit(_end(error, 2))
    except KeyboardInterrupt:  # before a point listens, or after
        sys.exit(128 + signal.SIGINT)
    if failed:
        sys.exit(1)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Inside a Hydra entry: a user's mistake ends in one line and exit code 1, no traceback."""
    try:
        yield
    except UserError as error:
        _end(error, 1)
        note_failure(str(error))


def _end(error: Exception, code: int) -> int:
    if is_main_process():  # the others make the same mistake
        sys.stderr.write(f"error: {error}\n")
    return code


def prepare(arguments: Sequence[str], config_name: str, check: Check = check_point) -> list[str]:
    """Rewrite `model=<path>` and check every point of the sweep.

    Raises:
        UserError: one line.
    """
    flags, words = split_flags(arguments)
    overrides = parse(words)
    words = [word for override in overrides for word in _model_words(override)]
    overrides = parse(words)
    for override in overrides:
        _check_choice(override)
    sweeping = {"-m", "--multirun"} & set(flags)
    if not sweeping and any(o.is_sweep_override() for o in overrides):
        raise UserError("several values in one override need -m (a sweep)")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for point in itertools.islice(points(overrides), MAX_CHECKED_POINTS):
            check(_compose(config_name, point))
    return [*flags, *words]


def split_flags(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Hydra's flags (with their values) apart from its overrides."""
    flags: list[str] = []
    words: list[str] = []
    rest = iter(arguments)
    for word in rest:
        if not word.startswith("-"):
            words.append(word)
            continue
        flags.append(word)
        if word in FLAGS_WITH_VALUE:
            flags.append(next(rest, ""))
    return flags, words


def points(overrides: Sequence[Override]) -> Iterator[list[str]]:
    """Override words of each point of the cartesian product."""
    lists = []
    for override in overrides:
        if override.is_sweep_override():
            name = override.get_key_element()
            lists.append([f"{name}={value}" for value in override.sweep_string_iterator()])
        else:
            lists.append([str(override.input_line)])
    return (list(words) for words in itertools.product(*lists))


def parse(words: Sequence[str]) -> list[Override]:
    """Hydra's reading of override words.

    Raises:
        UserError: one of them is none.
    """
    try:
        return list(OverridesParser.create().parse_overrides(list(words)))
    except HydraException as error:
        raise UserError(_one_line(error)) from error


def _compose(config_name: str, words: list[str]) -> dict[str, Any]:
    try:
        return resolve(compose(config_name, overrides=words))
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_one_line(error)) from error


def _model_words(override: Override) -> list[str]:
    """`model=<hub id or folder>` becomes `model=pretrained model.path=<hub id or folder>`."""
    word = str(override.input_line)
    if override.key_or_group != "model":
        return [word]
    sweep = override.is_sweep_override()
    values = list(override.sweep_string_iterator()) if sweep else [str(override.value())]
    known = _choices("model")
    foreign = [value for value in values if value not in known]
    for value in foreign:
        if "/" not in value and not Path(value).is_dir():
            raise UserError(
                f"unknown model {value!r}; known: {', '.join(known)}, "
                "or give a hub id (owner/name) or a folder"
            )
    if not foreign:
        return [word]
    if len(foreign) < len(values):
        raise UserError("sweep over files of conf/model and over hub ids or folders separately")
    return ["model=pretrained", f"model.path={word.split('=', 1)[1]}"]


def _choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def _check_choice(override: Override) -> None:
    group = override.key_or_group
    if group == "hydra/launcher":
        _check_launcher(override.get_value_string())
    if override.is_delete() or not (CONF / group).is_dir():
        return
    known = _choices(group)
    values = (
        override.sweep_string_iterator() if override.is_sweep_override() else [override.value()]
    )
    for value in values:
        if value is not None and str(value) not in known:
            raise UserError(f"unknown {group} {str(value)!r}; known: {', '.join(known)}")


def _check_launcher(name: str) -> None:
    if name not in LAUNCHERS:
        raise UserError(f"unknown hydra/launcher {name!r}; known: {', '.join(LAUNCHERS)}")
    if world_size() > 1 and name != "basic":
        raise UserError(f"hydra/launcher={name}: processes launched together share every point")
    needed = LAUNCHERS[name]
    if needed is not None and find_spec(needed[0]) is None:
        raise UserError(f"hydra/launcher={name} needs {needed[1]}: pip install {needed[1]}")
    if name == "ray":
        register()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
