"""Models larger than one device: the config keys `device_map` and `max_memory`.

accelerate places each part of the model (a GPU's number, `cpu`, `disk`) and moves inputs and
weights while it runs; the engine follows (`methods.engine.decoder.placement`).
"""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runners.errors import UserError
from runners.point_config import PlacementConfig, SpeedConfig
from runners.runtime.processes import world_size
from runners.store.files import disk_error

log = logging.getLogger(__name__)

WORDS = ("auto", "balanced", "sequential")
MEMORY = re.compile(r"\d+(\.\d+)?\s*([KMG]i?B)", re.IGNORECASE)
Place = int | str
"""The number of a GPU, `cpu` or `disk`."""


@dataclass(frozen=True)
class Asked:
    """What a config says about places.

    Args:
        places: one of `WORDS`, or places by module name.
        memory: what may be used of each place; None for all that is free.
        gpus: False keeps to the host.
    """

    places: str | dict[str, Place]
    memory: dict[Place, int | str] | None
    gpus: bool


def check(
    placement: PlacementConfig, speed: SpeedConfig | None, *, merge_lora: bool, here: bool
) -> None:
    """Refuse places that make no sense, or that this machine lacks.

    Args:
        here: False for a plan, which may be for another machine.

    Raises:
        UserError: what is wrong and what is allowed.
    """
    wanted = asked(placement)
    if wanted is None:
        if placement.max_memory is not None:
            raise UserError("max_memory does nothing without device_map: add device_map=auto")
        return
    if world_size() > 1:
        raise UserError("device_map places the model of one process: start it without a launcher")
    if placement.device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device={placement.device} is one device: with device_map, leave it out")
    if merge_lora:
        raise UserError("merge_lora=true needs all weights in one place: leave device_map out")
    for key, value in (("graphs", True), ("kernels", "triton")):
        if getattr(speed, key, None) == value:
            said = f"speed.{key}={str(value).lower()}"
            raise UserError(f"{said} needs the whole model on one GPU: leave device_map out")
    if here:
        _check_gpus(wanted, placement.device)


def asked(placement: PlacementConfig) -> Asked | None:
    """Put the two keys of a config in one form; None if the model is to be in one place.

    Raises:
        UserError: an unknown word, a place or an amount of memory that is none.
    """
    places: Any = placement.device_map
    memory: Any = placement.max_memory
    if places is None:
        return None
    if isinstance(places, Mapping) and places:
        if memory is not None:
            raise UserError(f"max_memory goes with device_map={' or '.join(WORDS)}, not a mapping")
        places = {str(name): _place(value, f"device_map.{name}") for name, value in places.items()}
    elif places not in WORDS:
        raise UserError(
            f"device_map must be null, {', '.join(WORDS)} or a mapping of modules to devices, "
            f"not {places!r}"
        )
    if memory is not None:
        if not isinstance(memory, Mapping) or not memory:
            raise UserError(f"max_memory must be a mapping like {{0:20GiB,cpu:64GiB}}: {memory!r}")
        memory = {_place(key, "max_memory"): _amount(key, value) for key, value in memory.items()}
        if "disk" in memory:
            raise UserError("max_memory takes GPUs and cpu: what fits in neither goes to disk")
    return Asked(places, memory, placement.device != "cpu")


def _place(value: Any, where: str) -> Place:
    found = re.fullmatch(r"(?:cuda:)?(\d+)|cuda|cpu|disk", str(value))
    if found is None or isinstance(value, bool):
        raise UserError(f"{where}: a place is the number of a GPU, cpu or disk, not {value!r}")
    if found[1] is not None:
        return int(found[1])
    return 0 if value == "cuda" else str(value)


def _amount(key: Any, value: Any) -> int | str:
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if whole or MEMORY.fullmatch(str(value)):
        amount: int | str = value
        return amount
    raise UserError(f"max_memory.{key} must be like 20GiB or a number of bytes, not {value!r}")


def _check_gpus(wanted: Asked, device: str) -> None:
    named = wanted.memory or (wanted.places if isinstance(wanted.places, dict) else {})
    keys = named if wanted.memory else named.values()
    gpus = sorted({place for place in keys if isinstance(place, int)})
    if not gpus and device != "cuda":
        return
    import torch

    there = torch.cuda.device_count()
    if gpus and device == "cpu":
        raise UserError(f"device=cpu, but device_map or max_memory names GPU {gpus[0]}")
    if there == 0:
        raise UserError("device_map, max_memory or device asks for CUDA, which is not available")
    if gpus and gpus[-1] >= there:
        raise UserError(f"device_map or max_memory names GPU {gpus[-1]}; this machine has {there}")


def layout(model: Any, wanted: Asked) -> dict[str, Place]:
    """The place of every part of a model, by module name.

    Args:
        model: a causal LM, with or without weights (on the meta device).

    Raises:
        UserError: a name that the model lacks, a part without a place, or a layer that would be
            computed on two devices.
    """
    tied = [
        (one.rpartition(".")[0], other.rpartition(".")[0])
        for one, other in model.all_tied_weights_keys.items()
    ]
    if isinstance(wanted.places, str):
        found = _complete(model, _inferred(model, wanted.places, wanted))
        found |= {one: found[other] for one, other in tied}
        return _told(found)
    names = {name for name, _ in model.named_modules()}
    if unknown := sorted(set(wanted.places) - names):
        parts = ", ".join(name for name in _complete(model, {"": "cpu"}) if ".layers." not in name)
        raise UserError(
            f"device_map names {unknown[0]}, which this model lacks; it has {parts} and layers "
            "like model.layers.0"
        )
    found = _complete(model, wanted.places)
    _check_layers(found)
    for one, other in tied:
        if found[one] != found[other]:
            raise UserError(f"device_map: {one} and {other} share a weight: give both one place")
    return _told(found)


def _inferred(model: Any, word: str, wanted: Asked) -> dict[str, Place]:
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory, get_max_memory

    memory, whole = wanted.memory, model._no_split_modules
    if memory is None and not wanted.gpus:
        memory = {"cpu": get_max_memory()["cpu"]}
    if word == "sequential":
        memory = get_max_memory(memory)
    else:
        memory = get_balanced_memory(model, memory, no_split_module_classes=whole)
    found: dict[str, Place] = infer_auto_device_map(
        model, max_memory=memory, no_split_module_classes=whole
    )
    return found


def _complete(model: Any, places: Mapping[str, Place]) -> dict[str, Place]:
    """One entry for each decoder layer and each other part, and below a layer where it is split."""

    def visit(name: str, module: Any, inherited: Place | None) -> Iterator[tuple[str, Place]]:
        own = places.get(name, inherited)
        children = list(module.named_children())
        below = any(key.startswith(f"{name}.") for key in places)
        layer = type(module).__name__ in model._no_split_modules
        if children and (below or not layer):
            for child, part in children:
                yield from visit(f"{name}.{child}".removeprefix("."), part, own)
        elif own is None:
            raise UserError(f"device_map has no place for {name}")
        else:
            yield name, own

    return dict(visit("", model, None))


def _check_layers(places: Mapping[str, Place]) -> None:
    """Each layer's parts are computed on one device; those on cpu or disk, on the first GPU."""
    gpus = sorted({place for place in places.values() if isinstance(place, int)})
    devices: dict[str, set[Place]] = {}
    for name, place in places.items():
        if found := re.match(r".*\.layers\.(\d+)\b", name):
            computed = place if isinstance(place, int) or not gpus else gpus[0]
            devices.setdefault(found[1], set()).add(computed if gpus else "cpu")
    for index, on in devices.items():
        if len(on) > 1:
            raise UserError(
                f"device_map splits layer {index} between GPUs {', '.join(map(str, sorted(on)))} "
                "(what is on cpu or disk is computed on the first): give a layer one device"
            )


def dispatch(model: Any, places: dict[str, Place], folder: Path | None) -> Any:
    """Put a model whose weights are in memory into its places.

    Args:
        folder: for the weights that go to disk.
    """
    from accelerate import dispatch_model

    keys = model._skip_keys_device_placement
    return dispatch_model(model, places, offload_dir=folder, skip_keys=keys)


def disk_folder(places: Mapping[str, Place], root: Path) -> Path | None:
    """An empty folder for weights that go to disk; None if none do.

    Raises:
        UserError: it cannot be made.
    """
    if "disk" not in places.values():
        return None
    parent = root / "offload"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(dir=parent))
    except OSError as error:
        raise disk_error(parent, error) from error


def remove_with(model: Any, folder: Path | None) -> None:
    """Remove the folder when the model goes, at the latest when the process ends."""
    if folder is not None:
        weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)


def _told(places: dict[str, Place]) -> dict[str, Place]:
    counts = Counter(
        f"GPU {place}" if isinstance(place, int) else place for place in places.values()
    )
    log.info("device_map: %s", ", ".join(f"{n} parts on {name}" for name, n in counts.items()))
    return places
