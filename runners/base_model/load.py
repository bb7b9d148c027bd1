"""From a resolved config to a model, a method, a budget."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from methods.base import Budget, StageBudget
from methods.engine.decoder.families import UnsupportedModel, require_family
from runners.base_model import device_map
from runners.base_model import fsdp as sharded
from runners.base_model.embedded import embedded_model
from runners.base_model.synthetic import random_model, tiny_model
from runners.errors import UserError
from runners.store.files import cache_root
from runners.store.provenance import hash_model
from runners.store.stage_cache import content_key


@dataclass(frozen=True)
class Base:
    """The untouched model of a point."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    weights_hash: str
    name: str
    revision: str | None


def load_base(cfg: Mapping[str, Any]) -> Base:
    """Load the model of a config, frozen and in evaluation mode; the last one is kept in memory.

    Raises:
        UserError: it cannot be loaded, or its family has no adapter.
    """
    key = {k: cfg[k] for k in ("model", "dtype", "device", "cache_dir", "seed")}
    key |= {k: cfg.get(k) for k in ("device_map", "max_memory")}
    if cfg["model"]["source"] not in RANDOM:
        key["seed"] = 0
    return _load_base(json.dumps(key, sort_keys=True))


RANDOM = ("tiny", "shape")
"""Sources of models whose weights are drawn from the seed."""


def _random_base(
    source: Mapping[str, Any], device: torch.device, dtype: torch.dtype, seed: int
) -> Base:
    """Random weights at real sizes; what tells them apart is how they were drawn."""
    drawn_from = content_key(source, str(device.type), str(dtype), seed)
    model, tokenizer = random_model(
        family=source["path"], sizes=source["config"], device=device, dtype=dtype, seed=seed
    )
    return Base(model.requires_grad_(False), tokenizer, drawn_from, source["name"], None)


@functools.lru_cache(maxsize=1)
def _load_base(key: str) -> Base:
    cfg = json.loads(key)
    source, device = cfg["model"], resolve_device(cfg["device"])
    dtype = resolve_dtype(cfg["dtype"], device)
    wanted, root = device_map.asked(cfg), cache_root(cfg["cache_dir"])
    if source["source"] == "shape":
        drawn_on = device if wanted is None else torch.device("cpu")
        drawn = _random_base(source, drawn_on, dtype, cfg["seed"])
        return drawn if wanted is None else replace(drawn, model=_placed(drawn.model, wanted, root))
    if source["source"] == "tiny":
        model, tokenizer = tiny_model(family=source["path"], seed=cfg["seed"])
        model = model.to(dtype)
        model = model if wanted is None else _placed(model, wanted, root)
    else:
        folder, options = source["path"], {}
        if source["source"] == "embedded":
            folder = embedded_model(source["path"], cache_dir=root)
        else:
            options = {
                "revision": source["revision"],
                "trust_remote_code": source["trust_remote_code"],
            }
        places = None if wanted is None else _places(str(folder), options, dtype, wanted)
        model, tokenizer = _from_transformers(str(folder), options, dtype, places, root)
    model = model.eval().requires_grad_(False)
    weights_hash = hash_model(model)
    if sharded.wanted():
        sharded.shard(model, device)
    if wanted is None:
        model = model.to(device)
    return Base(model, tokenizer, weights_hash, source["name"], source["revision"])


def _from_transformers(
    path: str,
    options: dict[str, Any],
    dtype: torch.dtype,
    places: dict[str, device_map.Place] | None,
    root: Path,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    folder = None if places is None else device_map.disk_folder(places, root)
    where = {} if places is None else {"device_map": places, "offload_folder": folder}
    with _loading(path):
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, use_safetensors=True, **options, **where
        )
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        require_family(model.config.model_type)
    device_map.remove_with(model, folder)
    return model, tokenizer


def _places(
    path: str, options: dict[str, Any], dtype: torch.dtype, wanted: device_map.Asked
) -> dict[str, device_map.Place]:
    """Where the parts of a model will be, from its sizes alone."""
    with _loading(path), torch.device("meta"):
        config = AutoConfig.from_pretrained(path, **options)
        require_family(config.model_type)
        bare = AutoModelForCausalLM.from_config(config, dtype=dtype)
    places = device_map.layout(bare, wanted)
    device_map.tell(places)
    return places


def _placed(model: PreTrainedModel, wanted: device_map.Asked, root: Path) -> PreTrainedModel:
    """A model that was drawn on the host, in its places."""
    places = device_map.layout(model, wanted)
    device_map.tell(places)
    folder = device_map.disk_folder(places, root)
    device_map.remove_with(model, folder)
    moved: PreTrainedModel = device_map.dispatch(model, places, folder)
    return moved


@contextmanager
def _loading(path: str) -> Iterator[None]:
    """What transformers raises, as one line."""
    try:
        yield
    except UnsupportedModel as error:
        raise UserError(f"model={path}: {error}") from error
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"cannot load model {path}: {reason} (without a network, give a local folder: "
            "model=./folder, or set HF_HOME to a filled cache)"
        ) from error


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA if there is one.

    Raises:
        UserError: not a device of this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={name} is not available: {str(error).splitlines()[0]}") from error
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where matrix units multiply it (CUDA, x86 with AMX), else float32.

    On a CPU with AMX the dense forward of SmolLM2-135M is about 3.4 times as fast in bfloat16
    as in float32; without AMX it is slower, so float32 stays.
    """
    if name != "auto":
        dtype = getattr(torch, name)
        assert isinstance(dtype, torch.dtype)
        return dtype
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    return torch.bfloat16 if device.type == "cpu" and amx else torch.float32


def build_budget(cfg: Mapping[str, Any]) -> Budget:
    """The budget of a config."""
    budget = cfg["budget"]
    return Budget(
        name=budget["name"],
        fit_tokens=budget["fit_tokens"],
        calibration_tokens=budget["calibration_tokens"],
        sensitivity_tokens=budget["sensitivity_tokens"],
        forecasters=StageBudget(**budget["forecasters"]),
        routers=StageBudget(**budget["routers"]),
        lora=StageBudget(**budget["lora"]),
    )
