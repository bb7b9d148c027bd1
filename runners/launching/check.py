"""Checks of a composed config that need no model: every mistake ends in one clear line."""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import netrc
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from methods.engine.decoder.families import UnsupportedModel, require_family
from methods.engine.ops.cpu.build import reason_without
from runners.base_model import device_map
from runners.corpus.rows import check_documents
from runners.corpus.source import check_source
from runners.errors import UserError
from runners.evaluation.builtin_tasks import GENERATORS
from runners.evaluation.stock_tasks import missing_files
from runners.evaluation.tasks import check_tasks
from runners.evaluation.texts import describe_text, missing_texts
from runners.point_config import BudgetConfig, DataConfig, parse_section
from runners.runtime.processes import check_batch_sizes
from runners.tracking.base import BACKENDS

CHOICES = {
    "objective": ("lm", "distill"),
    "mode": ("masked", "gathered"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
}


def check_config(cfg: Mapping[str, Any]) -> None:
    """Validate one point.

    Raises:
        UserError: what is wrong and what is allowed.
    """
    saved = cfg.get("saved")
    if saved is None or cfg["sparsity"] is not None:
        check_sparsity(cfg["sparsity"])
    for key, allowed in CHOICES.items():
        if cfg[key] not in allowed:
            raise UserError(f"{key} must be one of {', '.join(allowed)}, not {cfg[key]!r}")
    if not isinstance(cfg["seed"], int) and (saved is None or cfg["seed"] is not None):
        raise UserError(f"seed must be a whole number, not {cfg['seed']!r}")
    if saved is None:
        _check_model(cfg["model"])
    else:
        _check_saved(saved, cfg.get("base_model"))
    _check_budget(cfg["budget"])
    _check_data(cfg["data"])
    device_map.check(cfg)
    _check_survival(cfg)
    check_tracking(cfg["tracking"])
    if "speed" in cfg:
        _check_speed(cfg["speed"])
    check_evaluation(cfg["eval"])
    data = DataConfig(**cfg["data"])
    if data.kind == "files":
        limit, tasks = cfg["eval"]["perplexity"]["documents_limit"], tuple(cfg["eval"]["tasks"])
        budget = parse_section(BudgetConfig, cfg["budget"])
        _check_local_text(data, budget, limit, cfg["seed"] or 0, tasks)


@functools.lru_cache(maxsize=8)
def _check_local_text(
    data: DataConfig, budget: BudgetConfig, limit: int | None, seed: int, tasks: tuple[str, ...]
) -> None:
    """What a point will read can be read, and is enough for the tasks that are made of it."""
    test = check_documents(data, budget, limit, seed)["test"]
    for name in tasks:
        if name in GENERATORS:
            GENERATORS[name](test, seed)


def _check_data(data: Mapping[str, Any]) -> None:
    """Numbers, and local files as far as their schemas; the hub is asked when the point begins."""
    known = [field.name for field in fields(DataConfig)]
    if unknown := sorted(set(data) - set(known)):
        raise UserError(f"unknown data.{unknown[0]}; known: {', '.join(known)}")
    for key, least in (("documents_limit", 1), ("shuffle_buffer", 0)):
        value = data.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise UserError(f"data.{key} must be a whole number, not {value!r}")
        if value is not None and value < least:
            raise UserError(f"data.{key} must be at least {least}, not {value}")
    if data.get("dir") is not None:
        check_source(DataConfig(**data))


def check_tracking(tracking: Mapping[str, Any]) -> None:
    """The backend is known, its package installed, and an online one has a key.

    Raises:
        UserError: it would fail, or wait for an answer at a prompt.
    """
    backend = tracking["backend"]
    if backend not in BACKENDS:
        raise UserError(f"tracking.backend must be one of {', '.join(BACKENDS)}, not {backend!r}")
    if backend == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
        raise UserError(
            "tracking=tensorboard needs the package tensorboard: pip install -e '.[tensorboard]'"
        )
    if backend != "wandb":
        return
    if tracking["mode"] not in ("offline", "online"):
        raise UserError(f"tracking.mode must be offline or online, not {tracking['mode']!r}")
    if tracking["mode"] == "online" and not (os.environ.get("WANDB_API_KEY") or _logged_in()):
        raise UserError("tracking.mode=online needs WANDB_API_KEY in the environment")


def _logged_in() -> bool:
    """Whether `wandb login` has left a key for the service in use."""
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc().authenticators(str(host)) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def check_evaluation(settings: Mapping[str, Any]) -> None:
    """Tasks and texts are known, and the data folder, if one is given, holds what they need.

    Raises:
        UserError: one line that lists everything that is missing.
    """
    check_tasks(settings["tasks"])
    long = settings["long_context"]
    texts = [*settings["texts"], *([long["text"]] if long else [])]
    for name in texts:
        describe_text(name)
    if settings["data_dir"] is None:
        return
    folder = Path(settings["data_dir"]).expanduser()
    if not folder.is_dir():
        raise UserError(f"eval.data_dir={settings['data_dir']} is not a folder")
    foreign = [name for name in settings["tasks"] if name not in GENERATORS]
    lacking = missing_files(foreign, folder, settings["num_fewshot"] or {})
    lacking += missing_texts(texts, folder)
    if lacking:
        raise UserError(
            f"eval.data_dir={settings['data_dir']} lacks {', '.join(dict.fromkeys(lacking))}: "
            "leave them out (eval.tasks=[...], eval.texts=[...]), or fill the folder with "
            "runners/fetch.py on a machine that has a network"
        )


def _check_survival(cfg: Mapping[str, Any]) -> None:
    seconds = cfg.get("checkpoint_seconds")
    if seconds is not None and (not _is_number(seconds) or seconds < 0):
        raise UserError(f"checkpoint_seconds must be a number >= 0 or null, not {seconds!r}")
    if not isinstance(cfg["retry_failed"], bool):
        raise UserError(f"retry_failed must be true or false, not {cfg['retry_failed']!r}")


def check_sparsity(value: Any) -> None:
    """A share of bypassed pairs lies in [0, 1).

    Raises:
        UserError: it does not, or is no number.
    """
    if not _is_number(value) or not 0.0 <= value < 1.0:
        raise UserError(f"sparsity must be a number in [0, 1), not {value!r}")


def _is_number(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value)


def _check_budget(budget: Mapping[str, Any]) -> None:
    stages = ("forecasters", "routers", "lora")
    for stage in stages:
        for key, value in budget[stage].items():
            if not isinstance(value, int) or value < 1:
                raise UserError(f"budget.{stage}.{key} must be a whole number >= 1, not {value!r}")
    check_batch_sizes({stage: budget[stage]["batch_size"] for stage in stages})


SPEED_CHOICES = {
    "decisions": ("real", "random"),
    "kernels": ("auto", "compiled", "torch", "triton"),
    "graphs": ("auto", True, False),
}


def _check_speed(speed: Mapping[str, Any]) -> None:
    for key, allowed in SPEED_CHOICES.items():
        if speed[key] not in allowed:
            names = ", ".join(str(value).lower() for value in allowed)
            raise UserError(f"speed.{key} must be one of {names}, not {speed[key]!r}")
    if speed["kernels"] == "compiled" and (reason := reason_without()):
        raise UserError(f"speed.kernels=compiled: {reason}; speed.kernels=auto runs without")
    if not speed["trained"] and speed["decisions"] != "random":
        raise UserError("speed.trained=false needs speed.decisions=random: nothing is calibrated")
    sizes = {
        "warmup": [0 if speed["warmup"] is None else speed["warmup"] + 1],
        "repeats": [1 if speed["repeats"] is None else speed["repeats"]],
        **{f"prefill.{k}": v for k, v in speed["prefill"].items()},
        **{f"decode.{k}": v if k != "steps" else [v] for k, v in speed["decode"].items()},
    }
    for key, values in sizes.items():
        for value in values:
            if not isinstance(value, int) or value < (key != "warmup"):
                raise UserError(f"speed.{key} must hold whole numbers >= 1, not {value!r}")


def _check_saved(saved: str, model: str | None) -> None:
    missing = [n for n in ("routed.json", "routed.safetensors") if not (Path(saved) / n).is_file()]
    if missing:
        raise UserError(f"saved={saved} holds no saved routed model ({', '.join(missing)})")
    if model is not None:
        _check_model({"source": "pretrained", "path": model})


def _check_model(model: Mapping[str, Any]) -> None:
    if model["source"] != "pretrained":
        return
    path = str(model["path"])
    looks_local = path.startswith((".", "/", "~")) or Path(path).exists()
    if not looks_local:
        return
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(f"model={path}: no such folder")
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"model={path}: the folder holds no readable config.json") from error
    try:
        require_family(str(config.get("model_type")))
    except UnsupportedModel as error:
        raise UserError(f"model={path}: {error}") from error
