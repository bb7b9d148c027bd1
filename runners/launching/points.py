"""Read a command line and expand it into the points of its sweep, as Hydra will.

Nothing else expands a sweep: what is checked, planned and run is the same list.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from runners.errors import UserError
from runners.launching.ray_launcher import register
from runners.options import unknown
from runners.point_config import CONF, resolve
from runners.runtime.processes import world_size

AT_HOME = re.compile(r"^([^=]+=)~(?=/|$)")
"""Words that a shell leaves as they are, and Hydra cannot read."""
NAME, FOLDER = ("--config-name", "-cn"), ("--config-dir", "-cd")
WITH_VALUE = (*NAME, *FOLDER, *"--config-path -cp --cfg -c --info -i --package -p".split())
PLACES = {
    "model": ("pretrained", "path", "a hub id (owner/name) or a folder"),
    "data": ("files", "dir", "a folder"),
}
"""Groups that take a place for a file's name: the file, its option for the place, and what may be
given."""
LAUNCHERS = {
    "basic": None,
    "joblib": ("hydra_plugins.hydra_joblib_launcher", "hydra-joblib-launcher"),
    "submitit_local": ("hydra_plugins.hydra_submitit_launcher", "hydra-submitit-launcher"),
    "submitit_slurm": ("hydra_plugins.hydra_submitit_launcher", "hydra-submitit-launcher"),
    "ray": ("ray", "ray"),
}
"""Values of hydra/launcher, and what a value needs beside ours: a module, and its package."""


class CommandLine:
    """The words of a command, and the config of each point that they ask for.

    Args:
        arguments: of the script.
        config_name: of its config, where no flag names another.

    Raises:
        UserError: one line, here and in every method.
    """

    def __init__(self, arguments: Sequence[str], config_name: str) -> None:
        self.flags, words = split_flags(arguments)
        self.config_name = ([config_name, *self._values(NAME)])[-1]
        self.folders = [CONF, *(Path(f).absolute() for f in self._values(FOLDER))]
        words = [AT_HOME.sub(rf"\1{Path.home()}", word) for word in words]
        self.overrides = parse([w for o in parse(words) for w in self._place_words(o)])
        for override in self.overrides:
            self._check_choice(override)
        self.composed: dict[tuple[tuple[str, ...], bool], DictConfig] = {}
        """By the words that choose files, and before any option of the command line."""
        self.presets: dict[str, Any] = {}
        self.sweeping = bool({"-m", "--multirun"} & set(self.flags))
        if any(o.key_or_group.startswith(("experiment", "hydra")) for o in self.overrides):
            # the groups' choices are enough to see whether an experiment is a sweep by itself
            hydra = self._compose([o for o in self.overrides if self._is_choice(o)], True).hydra
            self.presets = dict(hydra.sweeper.params or {})
            self.sweeping |= str(hydra.mode).rpartition(".")[2] == "MULTIRUN"
        if not self.sweeping and any(o.is_sweep_override() for o in self.overrides):
            raise UserError("several values in one override need -m (a sweep)")

    def arguments(self) -> list[str]:
        """What Hydra is to get.

        It composes a sweep once with the default of a group that is swept, in which
        `method.first_layer=0` may be unknown: that becomes a sweep over one value, which is left
        to the points.
        """
        swept, words = self.swept, []
        for override in self.overrides:
            word = str(override.input_line)
            plain = override.is_sweep_override() or override.is_delete()
            if self.sweeping and not plain and override.key_or_group.partition(".")[0] in swept:
                value = override.get_value_element_as_str()
                word = f"{override.get_key_element()}=choice({value})"
            words.append(word)
        return [*self.flags, *words]

    def points(self) -> Iterator[dict[str, Any]]:
        """The resolved config of every point, in Hydra's order."""
        for point in self._expanded():
            try:
                yield resolve(self._compose(point))
            except OmegaConfBaseException as error:
                raise UserError(_one_line(error)) from error

    def __len__(self) -> int:
        """How many points there are."""
        return len(self._expanded())

    @property
    def swept(self) -> set[str]:
        """Options that have several values, or an interval."""
        return {*self.presets, *(o.key_or_group for o in self.overrides if o.is_sweep_override())}

    def check_keys(self) -> None:
        """Compose the first point, whatever its values, so that no unknown key reaches Hydra: its
        own message says how to add one, and a typo would run.

        Raises:
            UserError: such a key; a sweep, of which Hydra shows nothing.
        """
        if self.sweeping:
            raise UserError("--cfg and --info show one point: leave out -m")
        self._compose(self._expanded()[0])

    def _expanded(self) -> list[list[Override]]:
        """The words of every point."""
        if not self.sweeping:
            return [self.overrides]
        presets = parse([f"{key}={value}" for key, value in self.presets.items()])
        overrides = [_one_of_interval(o) for o in [*presets, *self.overrides]]
        batches = BasicSweeper.split_arguments(overrides, None)
        return [parse(point) for batch in batches for point in batch]

    def _compose(self, overrides: Sequence[Override], with_hydra: bool = False) -> DictConfig:
        """As Hydra composes: files first, then options one by one.

        Points of a sweep share most of their files, whose reading takes a tenth of a second.
        """
        words = tuple(str(o.input_line) for o in overrides if self._is_choice(o))
        try:
            if (words, with_hydra) not in self.composed:
                self.composed[words, with_hydra] = self._of_files(words, with_hydra)
            config = copy.deepcopy(self.composed[words, with_hydra])
            own = [override for override in overrides if not self._is_choice(override)]
            ConfigLoaderImpl._apply_overrides_to_config(own, config)
            return config
        except (HydraException, OmegaConfBaseException) as error:
            key = re.search(r"Could not (?:override|delete from config\.) '([^']+)'", str(error))
            if key is None:
                raise UserError(_one_line(error)) from error
            chosen = [o for o in overrides if self._is_choice(o) and o.key_or_group != key[1]]
            found = self._compose(chosen, key[1].startswith("hydra"))
            every = list(_dotted(OmegaConf.to_container(found)))
            raise unknown("option", key[1], self._siblings(key[1], found), every) from error

    def _of_files(self, choices: Sequence[str], with_hydra: bool) -> DictConfig:
        words = list(choices)
        # the primary config may lie in a user's folder, as a record's own does; Hydra finds groups
        # along the search path, but no primary config
        primary = f"{self.config_name}.yaml"
        home = next((path for path in self.folders if (path / primary).is_file()), CONF)
        if others := [path for path in self.folders if path != home]:
            places = ",".join(f"'file://{path}'" for path in others)
            words.append(f"hydra.searchpath=[{places}]")
        with initialize_config_dir(str(home), version_base="1.3"):
            return compose(self.config_name, words, return_hydra_config=with_hydra)

    def _siblings(self, key: str, config: Any) -> list[str]:
        """Options beside a key, where its parents are known."""
        parent, dot, _ = key.rpartition(".")
        for part in parent.split(".") if dot else ():
            if not isinstance(config, DictConfig) or config.get(part) is None:
                return self._siblings(parent, config)
            config = config[part]
        return [f"{parent}{dot}{name}" for name in config]

    def _values(self, names: Sequence[str]) -> list[str]:
        pairs = zip(self.flags, self.flags[1:], strict=False)
        return [value for flag, value in pairs if flag in names]

    def _is_choice(self, override: Override) -> bool:
        """Whether it picks a file of a group, or is Hydra's own, for all points."""
        group = override.key_or_group
        own = group.startswith("hydra") or any((f / group).is_dir() for f in self.folders)
        return own and not override.is_sweep_override()

    def _choices(self, group: str) -> list[str]:
        return sorted({p.stem for folder in self.folders for p in (folder / group).glob("*.yaml")})

    def _place_words(self, override: Override) -> list[str]:
        """`model=<hub id or folder>` becomes `model=pretrained model.path=<hub id or folder>`, and
        `data=<folder>` becomes `data=files data.dir=<folder>`."""
        word, group = str(override.input_line), override.key_or_group
        if group not in PLACES:
            return [word]
        file, option, allowed = PLACES[group]
        known, values = self._choices(group), _values_of(override)
        foreign = [value for value in values if value not in known]
        for value in foreign:
            if "/" not in value and not Path(value).expanduser().is_dir():
                raise UserError(f"{unknown(group, value, known)}, or give {allowed}")
        if not foreign:
            return [word]
        if len(foreign) < len(values):
            raise UserError(f"sweep over files of conf/{group} and over {allowed} separately")
        return [f"{group}={file}", f"{group}.{option}={word.split('=', 1)[1]}"]

    def _check_choice(self, override: Override) -> None:
        group = override.key_or_group
        if group == "hydra/launcher":
            _check_launcher(override.get_value_string())
        known = self._choices(group)
        if override.is_delete() or not known:
            return
        for value in _values_of(override):
            if value not in (*known, "None"):
                raise unknown(group, value, known)


def _dotted(config: Any, prefix: str = "") -> Iterator[str]:
    """Every option's name."""
    for name, inner in config.items():
        own = f"{prefix}{name}"
        yield from _dotted(inner, f"{own}.") if isinstance(inner, dict) and inner else [own]


def split_flags(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Hydra's flags (with their values) apart from its overrides.

    Raises:
        UserError: a flag that Hydra does not have.
    """
    flags: list[str] = []
    words: list[str] = []
    rest, known = iter(arguments), list(get_args_parser()._option_string_actions)
    for word in rest:
        if not word.startswith("-"):
            words.append(word)
            continue
        name = word.partition("=")[0]
        if not any(flag.startswith(name) for flag in known):
            raise unknown("flag", name, known)
        flags.append(word)
        if word in WITH_VALUE:
            flags.append(next(rest, ""))
    return flags, words


def parse(words: Sequence[str]) -> list[Override]:
    """Hydra's reading of override words.

    Raises:
        UserError: one of them is none; how it is to be quoted.
    """
    parser, found = OverridesParser.create(), []
    for word in words:
        try:
            found.append(parser.parse_override(word))
        except HydraException as error:
            key, separator, value = word.partition("=")
            if not separator:
                raise UserError(f"{word!r} is no option: options are key=value") from error
            quoted = value.strip("'\"").replace('"', '\\"')
            raise UserError(
                f"cannot read {word!r}: a value with = ( ) [ ] {{ }} , : blanks or letters beyond "
                f"ASCII is quoted within quotes, '{key}=\"{quoted}\"'"
            ) from error
    return found


def _one_of_interval(override: Override) -> Override:
    """The override itself, or the first value of an interval that a search draws from."""
    value = override.value()
    if not isinstance(value, IntervalSweep):
        return override
    return parse([f"{override.get_key_element()}={value.start}"])[0]


def _values_of(override: Override) -> list[str]:
    if override.is_sweep_override():
        return [str(value).strip("'\"") for value in override.sweep_string_iterator()]
    return [str(override.value())]


def _check_launcher(name: str) -> None:
    if name not in LAUNCHERS:
        raise unknown("hydra/launcher", name, LAUNCHERS)
    if world_size() > 1 and name != "basic":
        raise UserError(f"hydra/launcher={name}: processes launched together share every point")
    needed = LAUNCHERS[name]
    if needed is not None and find_spec(needed[0]) is None:
        raise UserError(f"hydra/launcher={name} needs {needed[1]}: pip install {needed[1]}")
    if name == "ray":
        register()


def _one_line(error: Exception) -> str:
    if "hydra/sweeper/optuna" in str(error):
        return "a search needs Hydra's Optuna sweeper: pip install -e '.[tune]'"
    return " ".join(str(error).split())
