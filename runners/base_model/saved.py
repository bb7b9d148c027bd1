"""Open a saved routed model together with the base model that it was trained on."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from methods.base import Method
from methods.engine.checkpoint import BadCheckpoint, from_pretrained
from runners.base_model import device_map as places
from runners.base_model.load import Base, load_base
from runners.errors import UserError
from runners.point_config import Dtype, ModelConfig, PlacementConfig, read_saved, saved_model

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opened:
    """A base model, the method attached to it, and what the folder says of both."""

    base: Base
    method: Method
    settings: dict[str, Any]


def open_saved(
    folder: Path | str,
    *,
    base_model: str | None = None,
    device: str | None = None,
    dtype: Dtype = "auto",
    device_map: str | None = None,
    cache_dir: str | None = None,
    trust_remote_code: bool = False,
    trust_method: bool = False,
    check_weights: bool = True,
) -> Opened:
    """Load a saved routed model with its base.

    Args:
        folder: with routed.json and routed.safetensors.
        base_model: hub id or folder of the base; None for the one that the folder names.
        device: None for CUDA if there is one; CUDA that is not there means the CPU.
        dtype: `auto` is that of training.
        device_map: for a base model larger than one device, as in `conf/score.yaml`.
        trust_method: True imports a class outside this project that the folder names.
        check_weights: False takes a base model of other weights, or in another dtype.

    Raises:
        UserError: a folder, model or value that cannot be used.
    """
    settings = read_saved(Path(folder), trust_method=trust_method)
    device = device or "auto"
    if device.startswith("cuda") and not torch.cuda.is_available():
        log.warning("device=%s is not there: the CPU is used", device)
        device = "cpu"
    model = saved_model(settings, base_model) | {"trust_remote_code": trust_remote_code}
    named = settings["base"]
    dtype = named.get("dtype", "auto") if dtype == "auto" else dtype
    placement = PlacementConfig(device, dtype, device_map, None)
    places.check(placement, None, merge_lora=False, here=True)
    base = load_base(ModelConfig(**model), placement, named["seed"], cache_dir)
    method = load_method(
        folder,
        base,
        target=settings["target"],
        trained_on=named["weights_sha256"],
        check_weights=check_weights,
    )
    return Opened(base, method, settings)


def load_method(
    folder: Path | str, base: Base, *, target: str, trained_on: str, check_weights: bool
) -> Method:
    """Build and load the method of a saved routed model, attached to its base model.

    Args:
        target: dotted name of its class, which the caller trusts.
        trained_on: hash of the weights that the folder names.
        check_weights: as in `require_weights`.

    Raises:
        UserError: other weights, or files that cannot be used.
    """
    require_weights(folder, base, trained_on=trained_on, check=check_weights)
    package = target.partition(".")[0]
    try:
        return from_pretrained(folder, base.model, allow=[package], check_weights=False)
    except BadCheckpoint as error:
        raise UserError(str(error)) from error


def require_weights(folder: Path | str, base: Base, *, trained_on: str, check: bool) -> None:
    """Refuse a base model that a saved method was not trained on: its figures would be nobody's.

    Args:
        check: False says so in the log and goes on.

    Raises:
        UserError: other weights, or another dtype.
    """
    if trained_on == base.weights_hash:
        return
    said = (
        f"{folder} was trained on weights {trained_on[:12]}, not on {base.weights_hash[:12]} of "
        f"{base.name} in {base.dtype}"
    )
    if check:
        raise UserError(f"{said}: give its own base model and dtype, or check_weights=false")
    log.warning(said)
