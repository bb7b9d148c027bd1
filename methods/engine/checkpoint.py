"""Save and load what a method added to a model: safetensors + JSON, never the base weights."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from methods.base import Method
from methods.engine.wrap import attach

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = 1
SETTINGS, TENSORS = "routed.json", "routed.safetensors"


class BadCheckpoint(ValueError):
    """The folder does not hold a routed model for this base model; the message says why."""


def save_pretrained(
    method: Method,
    folder: Path | str,
    *,
    target: str,
    options: dict[str, Any],
    base: dict[str, Any],
) -> Path:
    """Write the method's own tensors and how to build it again, atomically.

    Args:
        method: set up and trained.
        folder: created if missing.
        target: import path of the class, `methods.<file>.<Class>`.
        options: keyword arguments of its constructor (JSON values).
        base: identity of the base model (name, revision, weights hash), kept for the reader.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().cpu().contiguous() for k, v in method.state_dict().items()}
    partial = folder / f"{TENSORS}.{os.getpid()}.tmp"
    save_file(tensors, str(partial))
    os.replace(partial, folder / TENSORS)
    settings = {"format": FORMAT, "target": target, "options": options, "base": base}
    partial = folder / f"{SETTINGS}.{os.getpid()}.tmp"
    partial.write_text(json.dumps(settings, indent=2) + "\n")
    os.replace(partial, folder / SETTINGS)
    return folder


def from_pretrained(folder: Path | str, model: PreTrainedModel) -> Method:
    """Build the saved method for `model` and load its tensors strictly.

    Raises:
        BadCheckpoint: missing or foreign files, a class outside `methods`, other tensor names
            or shapes than this model's.
    """
    settings = read_settings(folder)
    method = _build(settings["target"], settings["options"])
    attach(model, method)
    load_tensors(method, Path(folder) / TENSORS)
    return method.eval()


def load_tensors(method: Method, path: Path) -> None:
    """Strictly load a safetensors file into a method that is already set up.

    Raises:
        BadCheckpoint: missing or damaged file, other names or shapes.
    """
    try:
        tensors = load_file(str(path))
    except (OSError, SafetensorError) as error:
        raise BadCheckpoint(f"{path} is missing or damaged: {error}") from error
    own = method.state_dict()
    wrong = sorted(set(own) ^ set(tensors)) or [k for k in own if own[k].shape != tensors[k].shape]
    if wrong:
        raise BadCheckpoint(f"{path} does not fit this method and model: {', '.join(wrong[:4])}")
    with torch.no_grad():
        method.load_state_dict(tensors, strict=True)


def read_settings(folder: Path | str) -> dict[str, Any]:
    """The JSON part of a saved routed model.

    Raises:
        BadCheckpoint: no such file, damaged, another format.
    """
    path = Path(folder) / SETTINGS
    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadCheckpoint(
            f"{folder} holds no saved routed model ({SETTINGS}: {error})"
        ) from error
    found = settings.get("format") if isinstance(settings, dict) else None
    if found != FORMAT:
        raise BadCheckpoint(f"{path} has format {found}, expected {FORMAT}")
    if not (isinstance(settings.get("target"), str) and isinstance(settings.get("options"), dict)):
        raise BadCheckpoint(f"{path} does not say which method to build")
    return settings


def _build(target: str, options: dict[str, Any]) -> Method:
    """Only classes of this package are built from a file: a foreign JSON must not import code."""
    module, _, name = target.rpartition(".")
    if not module.startswith("methods.") or module.startswith("methods.engine"):
        raise BadCheckpoint(f"{target!r} is not a method of this package")
    try:
        cls = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        raise BadCheckpoint(f"{target!r} is not a method of this package") from error
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise BadCheckpoint(f"{target!r} is not a method of this package")
    try:
        return cls(**options)
    except (TypeError, ValueError) as error:
        raise BadCheckpoint(f"{target} cannot be built with the saved options: {error}") from error
