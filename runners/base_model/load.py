"""From a resolved config to a model, a method, a budget."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
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
from transformers.utils import logging as transformers_logging

from methods.base import Budget, StageBudget
from methods.engine.checkpoint import hash_model
from methods.engine.decoder.families import UnsupportedModel, require_family
from runners.base_model import device_map
from runners.base_model import fsdp as sharded
from runners.base_model.embedded import embedded_model
from runners.base_model.synthetic import random_model, tiny_model
from runners.errors import UserError
from runners.point_config import BudgetConfig, ModelConfig, PlacementConfig
from runners.store.files import cache_root
from runners.store.stage_cache import content_key


@dataclass(frozen=True)
class Base:
    """The untouched model of a point."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    weights_hash: str
    name: str
    revision: str | None

    @property
    def dtype(self) -> str:
        """Name of the precision that it computes in, `float32`."""
        return str(next(self.model.parameters()).dtype).removeprefix("torch.")


def load_base(
    config: ModelConfig, placement: PlacementConfig, seed: int, cache_dir: str | None
) -> Base:
    """Load a model, frozen and in evaluation mode; the last one is kept in memory.

    Args:
        seed: of weights that are drawn.

    Raises:
        UserError: it cannot be loaded, or its family has no adapter.
    """
    drawn = config.source in ("tiny", "shape")
    key = repr((config, placement, seed if drawn else None, cache_dir))
    if key not in _kept:
        _kept.clear()  # before the next one is loaded: two may not fit
        _kept[key] = _load(config, placement, seed, cache_root(cache_dir))
    return _kept[key]


_kept: dict[str, Base] = {}


def _load(config: ModelConfig, placement: PlacementConfig, seed: int, root: Path) -> Base:
    device = resolve_device(placement.device)
    dtype = resolve_dtype(placement.dtype, device)
    wanted = device_map.asked(placement)
    if config.source in ("tiny", "shape"):
        on = torch.device("cpu") if config.source == "tiny" or wanted is not None else device
        model, tokenizer = _drawn(config, on, dtype, seed)
        model = model if wanted is None else _placed(model, wanted, root)
    else:
        embedded = config.source == "embedded"
        path = str(embedded_model(config.path, cache_dir=root)) if embedded else config.path
        asked = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
        model, tokenizer = _from_transformers(path, {} if embedded else asked, dtype, wanted, root)
    model = model.eval().requires_grad_(False)
    # weights at real sizes are told apart by how they were drawn: hashing them takes minutes
    shape = content_key(asdict(config), device.type, str(dtype), seed)
    weights_hash = shape if config.source == "shape" else hash_model(model)
    if sharded.wanted():
        sharded.shard(model, device)
    if wanted is None:
        model = model.to(device)
    return Base(model, tokenizer, weights_hash, config.name, config.revision)


def _drawn(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, seed: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A tiny model, drawn in float32 whatever it computes in, or one of the sizes of a config."""
    if config.source == "tiny":
        model, tokenizer = tiny_model(family=config.path, seed=seed)
        return model.to(dtype), tokenizer
    assert config.config is not None
    drawn: tuple[PreTrainedModel, PreTrainedTokenizerBase] = random_model(
        family=config.path, sizes=config.config, device=device, dtype=dtype, seed=seed
    )
    return drawn


def _from_transformers(
    path: str,
    options: dict[str, Any],
    dtype: torch.dtype,
    wanted: device_map.Asked | None,
    root: Path,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    where, folder = {}, None
    transformers_logging.disable_progress_bar()  # a bar of weights says nothing of the run
    with _loading(path):
        if wanted is not None:  # where its parts will be, from its sizes alone
            with torch.device("meta"):
                sizes = AutoConfig.from_pretrained(path, **options)
                require_family(sizes.model_type)
                bare = AutoModelForCausalLM.from_config(sizes, dtype=dtype)
            places = device_map.layout(bare, wanted)
            folder = device_map.disk_folder(places, root)
            where = {"device_map": places, "offload_folder": folder}
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, use_safetensors=True, **options, **where
        )
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        require_family(model.config.model_type)
    device_map.remove_with(model, folder)
    return model, tokenizer


def _placed(model: PreTrainedModel, wanted: device_map.Asked, root: Path) -> PreTrainedModel:
    """A model that was drawn on the host, in its places."""
    places = device_map.layout(model, wanted)
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


def build_budget(budget: BudgetConfig) -> Budget:
    """The budget as a method sees it."""
    stages = {
        name: StageBudget(**asdict(getattr(budget, name)))
        for name in ("forecasters", "routers", "lora")
    }
    return Budget(
        name=budget.name,
        fit_tokens=budget.fit_tokens,
        calibration_tokens=budget.calibration_tokens,
        sensitivity_tokens=budget.sensitivity_tokens,
        **stages,
    )
