"""Save and load what a method added to a model: safetensors + JSON, never the base weights."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from methods.base import LoraSpec, Method
from methods.engine.decoder.offload import stored
from methods.engine.lora import LoraFactors, attach_lora, describe
from methods.engine.routed import attach

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = 1
SETTINGS, TENSORS = "routed.json", "routed.safetensors"
ADAPTER_SETTINGS, ADAPTER_TENSORS = "adapter_config.json", "adapter_model.safetensors"
"""peft's names: `PeftModel.from_pretrained` reads the adapters from the same folder."""


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
    if isinstance(method.adapter, LoraFactors):
        _write_json(folder / ADAPTER_SETTINGS, method.adapter.peft_config())
        _write_tensors(folder / ADAPTER_TENSORS, method.adapter.peft_tensors())
    _write_tensors(folder / TENSORS, own_tensors(method))
    lora = describe(method.adapter)
    settings = {"format": FORMAT, "target": target, "options": options, "reserve": method.reserve}
    _write_json(folder / SETTINGS, {**settings, "base": base, "lora": lora})
    return folder


def from_pretrained(
    folder: Path | str,
    model: PreTrainedModel,
    *,
    allow: Sequence[str] = (),
    check_weights: bool = True,
) -> Method:
    """Build the saved method for `model` and load its tensors strictly.

    Args:
        allow: packages beside `methods` whose classes may be built: loading one runs its code.
        check_weights: False takes a model with other weights, or another dtype, than the method
            was trained on.

    Raises:
        BadCheckpoint: missing or foreign files, a class outside `methods` and `allow`, other
            weights, tensor names or shapes than this model's.
    """
    settings = read_settings(folder)
    trained_on = settings["base"].get("weights_sha256") if check_weights else None
    if trained_on is not None and trained_on != (found := hash_model(model)):
        raise BadCheckpoint(
            f"{folder} was trained on weights {trained_on[:12]} (or another dtype), not on these, "
            f"{found[:12]}; check_weights=False loads it all the same"
        )
    method = _build(settings["target"], settings["options"], allow)
    method.reserve = settings.get("reserve", 0)
    attach(model, method)
    restore(method, folder, model)
    return method.eval()


def restore(method: Method, folder: Path | str, model: PreTrainedModel) -> None:
    """Strictly load a saved folder, its adapter included, into a method set up for `model`.

    Raises:
        BadCheckpoint: missing or damaged file, other names or shapes.
    """
    folder = Path(folder)
    lora = read_settings(folder).get("lora")
    tensors = _read(folder / TENSORS)
    method.adopt({name: value.shape for name, value in tensors.items()})
    _copy(tensors, own_tensors(method), folder / TENSORS)
    if lora is None:
        return
    try:
        adapter = attach_lora(model, method, LoraSpec(**lora))
    except (TypeError, ValueError) as error:
        raise BadCheckpoint(f"{folder / SETTINGS} names unusable adapters: {error}") from error
    _copy(_read(folder / ADAPTER_TENSORS), adapter.peft_tensors(), folder / ADAPTER_TENSORS)


def load_tensors(method: Method, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Strictly load the whole state, an adapter that is attached included.

    Args:
        path: of the file that the tensors were read from.

    Raises:
        BadCheckpoint: other names or shapes.
    """
    method.adopt({name: value.shape for name, value in tensors.items()})
    _copy(tensors, method.state_dict(), path)


def own_tensors(method: Method) -> dict[str, Tensor]:
    """The method's state without the backbone's adapter."""
    return {k: v for k, v in method.state_dict().items() if not k.startswith("adapter.")}


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(str(path))
    except (OSError, SafetensorError) as error:
        raise BadCheckpoint(f"{path} is missing or damaged: {error}") from error


def _copy(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], path: Path) -> None:
    """Fill `own`, which the file's tensors must fit exactly."""
    wrong = sorted(set(own) ^ set(tensors)) or [k for k in own if own[k].shape != tensors[k].shape]
    if wrong:
        raise BadCheckpoint(f"{path} does not fit this method and model: {', '.join(wrong[:4])}")
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(tensors[name])


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    # not save_file, whose files nobody else may read whatever the umask
    _write(path, save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}))


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    _write(path, f"{json.dumps(value, indent=2, default=sorted)}\n".encode())


def _write(path: Path, data: bytes) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


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
    kinds = {"target": str, "options": dict, "base": dict}
    known = all(isinstance(settings.get(name), kind) for name, kind in kinds.items())
    if not known or type(settings.get("reserve", 0)) is not int:
        raise BadCheckpoint(f"{path} does not say which method to build")
    return settings


def _build(target: str, options: dict[str, Any], allow: Sequence[str]) -> Method:
    """Build a method of this package or an allowed one: a foreign JSON must not import code."""
    module, _, name = target.rpartition(".")
    if module.startswith("methods."):  # whatever is allowed: the engine's classes are no methods
        known = not module.startswith("methods.engine")
    else:
        known = any(f"{module}.".startswith(f"{package}.") for package in allow)
    if not known:
        package = target.partition(".")[0]
        raise BadCheckpoint(
            f"{target!r} is not a method of this package; allow={package} loads what you trust"
        )
    try:
        cls = getattr(importlib.import_module(module), name, None)
        if not (isinstance(cls, type) and issubclass(cls, Method)):
            raise BadCheckpoint(f"{target!r} is not a method")
        return cls(**options)
    except ModuleNotFoundError as error:
        raise BadCheckpoint(f"{target!r} cannot be imported: {error}") from error
    except (TypeError, ValueError) as error:
        if isinstance(error, BadCheckpoint):
            raise
        raise BadCheckpoint(f"{target} cannot be built with the saved options: {error}") from error


def hash_model(model: nn.Module) -> str:
    """sha256 over name, shape, dtype and bytes of every parameter and buffer, in name order.

    Tied weights count once. Tensors are read one at a time, so a model on an accelerator, or one
    whose weights are offloaded, needs host memory for its largest tensor only. Where the weights
    lie does not count.
    """
    digest = hashlib.sha256()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, source in getattr(model, "all_tied_weights_keys", {}).items():
        if source in tensors:  # offloaded, the two are no longer one object
            tensors.pop(name, None)
    for name in sorted(tensors):
        tensor = stored(model, name, tensors[name])
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        digest.update(memoryview(flat.view(torch.uint8).numpy()))  # type: ignore[arg-type]
    return digest.hexdigest()
