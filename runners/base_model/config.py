"""A model's Hugging Face config, with or without its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig, PretrainedConfig

from runners.base_model.synthetic import tiny_model
from runners.errors import UserError
from runners.point_config import CONF, ModelConfig
from runners.store.files import cache_root

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def model_config(model: ModelConfig, cache_dir: str | None) -> PretrainedConfig:
    """Sizes of the model of a point: from its folder or the hub, else from `conf/model`.

    A hub model that is not within reach has the sizes of `conf/model/<name>_shape.yaml`.

    Raises:
        UserError: no source of its sizes.
    """
    if model.source == "tiny":
        found: PretrainedConfig = tiny_model(family=model.path)[0].config
        return found
    if model.source == "shape":
        return AutoConfig.for_model(model.path, **(model.config or {}))
    folder, shape_file = (
        local_folder(model, cache_dir),
        CONF / "model" / f"{model.name}_shape.yaml",
    )
    if shape_file.is_file() and not weights_are_here(
        model, cache_dir
    ):  # the same sizes, without a request
        shape = yaml.safe_load(shape_file.read_text())
        return AutoConfig.for_model(shape["path"], **shape["config"])
    try:
        return AutoConfig.from_pretrained(folder or model.path, **_options(model))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"no config of model {model.path}: {reason}") from error


def local_folder(model: ModelConfig, cache_dir: str | None) -> Path | None:
    """Where the weights of an embedded model or a local folder lie; None if they do not."""
    if model.source == "embedded":
        folder = cache_root(cache_dir) / "models" / model.path
    else:
        folder = Path(str(model.path)).expanduser()
    return folder if (folder / "config.json").is_file() else None


def weights_are_here(model: ModelConfig, cache_dir: str | None) -> bool:
    """True if a run would load the model from this machine; random ones of real size are drawn."""
    if model.source in ("tiny", "shape"):
        return bool(model.source == "tiny")
    if local_folder(model, cache_dir) is not None:
        return True
    revision = model.revision or "main"
    return model.source == "pretrained" and any(
        isinstance(try_to_load_from_cache(model.path, name, revision=revision), str)
        for name in WEIGHTS
    )


def _options(model: ModelConfig) -> dict[str, Any]:
    if model.source != "pretrained":
        return {}
    return {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
