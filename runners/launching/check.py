"""Checks of a point before any model loads: every mistake ends in one clear line.

Types, ranges, choices and names are looked at where a config is parsed; here is what takes a look
at the machine: files, packages, devices, keys of services.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import netrc
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from methods.engine.decoder.families import UnsupportedModel, require_family
from runners.base_model import device_map
from runners.corpus.rows import check_documents
from runners.corpus.source import check_source
from runners.errors import UserError
from runners.evaluation.builtin_tasks import GENERATORS
from runners.evaluation.stock_tasks import missing_files
from runners.evaluation.tasks import check_tasks
from runners.evaluation.texts import describe_text, missing_texts
from runners.point_config import (
    BudgetConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    PlacementConfig,
    PointConfig,
    SpeedConfig,
    TrackingConfig,
)
from runners.runtime.processes import check_batch_sizes, world_size

ELSEWHERE = ("hydra/launcher=ray", "hydra/launcher=submitit_slurm")
"""Words of a command whose points run on other machines."""


def check_point(config: Mapping[str, Any]) -> PointConfig:
    """Check one point of a sweep.

    Args:
        config: resolved.

    Returns:
        The point.

    Raises:
        UserError: what is wrong and what is allowed.
    """
    point = PointConfig.parse(config)
    point.method.make(point.sparsity, point.reserve)
    _check_model(point.model)
    stages = ("forecasters", "routers", "lora")
    check_batch_sizes({name: getattr(point.budget, name).batch_size for name in stages})
    if point.data.kind == "files":
        check_source(point.data)
        limit, tasks = point.eval.perplexity.documents_limit, point.eval.tasks
        _check_local_text(point.data, point.budget, limit, point.seed, tasks)
    here = point.plan is None and not any(word.startswith(ELSEWHERE) for word in sys.argv)
    device_map.check(point.placement, point.speed, merge_lora=point.merge_lora, here=here)
    if here:
        _check_device(point.placement.device)
    for key in ("results_dir", "cache_dir"):
        check_writable(key, getattr(point.store, key))
    check_tracking(point.tracking)
    if point.speed is not None:
        _check_speed(point.speed, point.placement, here=here)
    check_evaluation(point.eval)
    return point


@functools.lru_cache(maxsize=8)
def _check_local_text(
    data: DataConfig, budget: BudgetConfig, limit: int | None, seed: int, tasks: tuple[str, ...]
) -> None:
    """What a point will read can be read, and is enough for the tasks that are made of it."""
    test = check_documents(data, budget, limit, seed)["test"]
    for name in tasks:
        if name in GENERATORS:
            GENERATORS[name](test, seed)


def check_tracking(tracking: TrackingConfig) -> None:
    """The backend's package is installed, and an online one has a key.

    Raises:
        UserError: it would fail, or wait for an answer at a prompt.
    """
    if tracking.backend == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
        raise UserError(
            "tracking=tensorboard needs the package tensorboard: pip install -e '.[tensorboard]'"
        )
    if tracking.backend != "wandb" or tracking.mode != "online":
        return
    if not (os.environ.get("WANDB_API_KEY") or _logged_in()):
        raise UserError("tracking.mode=online needs WANDB_API_KEY in the environment")


def _logged_in() -> bool:
    """Whether `wandb login` has left a key for the service in use."""
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc().authenticators(str(host)) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def check_evaluation(settings: EvalConfig) -> None:
    """Tasks and texts are known, and the data folder, if one is given, holds what they need.

    Raises:
        UserError: one line that lists everything that is missing.
    """
    check_tasks(settings.tasks)
    for name in settings.text_names:
        describe_text(name)
    if settings.data_dir is None:
        return
    folder = Path(settings.data_dir)
    if not folder.is_dir():
        raise UserError(f"eval.data_dir={settings.data_dir} is not a folder")
    foreign = [name for name in settings.tasks if name not in GENERATORS]
    lacking = missing_files(foreign, folder, settings.num_fewshot)
    lacking += missing_texts(settings.text_names, folder)
    if lacking:
        raise UserError(
            f"eval.data_dir={settings.data_dir} lacks {', '.join(dict.fromkeys(lacking))}: "
            "leave them out (eval.tasks=[...], eval.texts=[...]), or fill the folder with "
            "runners/fetch.py on a machine that has a network"
        )


def check_writable(key: str, folder: str | None) -> None:
    """The nearest folder above that is there takes new files.

    Raises:
        UserError: it does not.
    """
    if folder is None:
        return
    there = Path(folder).absolute()
    while not there.exists():
        there = there.parent
    try:  # permissions alone do not tell: root may write everywhere but where nobody can
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise UserError(f"cannot write {key}={folder}: choose another folder") from error


def _check_device(name: str) -> None:
    """It is on this machine."""
    if name == "auto":
        return
    import torch

    try:
        there = torch.device(name).type != "cuda" or torch.cuda.is_available()
    except RuntimeError:
        there = False
    if not there:
        raise UserError(f"device={name} is not available; auto, cpu, cuda or cuda:<number>")


def _check_speed(speed: SpeedConfig, placement: PlacementConfig, *, here: bool) -> None:
    if speed.graphs is True and here:
        import torch

        if placement.device == "cpu" or not torch.cuda.is_available():
            raise UserError("speed.graphs=true needs a model on CUDA; speed.graphs=auto decides")
    if speed.in_sweep and world_size() > 1:
        raise UserError("speed is measured in one process: leave speed=sweep out, or the launcher")
    if speed.kernels == "compiled":
        from methods.engine.ops.choose import loops_for  # needs torch
        from methods.engine.ops.cpu.build import reason_without
        from runners.base_model.load import resolve_device, resolve_dtype

        dtype = resolve_dtype(placement.dtype, resolve_device(placement.device))
        if reason := reason_without(loops_for(dtype).dtype):
            raise UserError(f"speed.kernels=compiled: {reason}; speed.kernels=auto runs without")
    if not speed.trained and speed.decisions != "random":
        raise UserError("speed.trained=false needs speed.decisions=random: nothing is calibrated")


def _check_model(model: ModelConfig) -> None:
    if model.source != "pretrained":
        return
    looks_local = model.path.startswith((".", "/")) or Path(model.path).exists()
    if not looks_local:
        return
    folder = Path(model.path)
    if not folder.is_dir():
        raise UserError(f"model={model.path}: no such folder")
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"model={model.path}: the folder holds no readable config.json") from error
    try:
        require_family(str(config.get("model_type")))
    except UnsupportedModel as error:
        raise UserError(f"model={model.path}: {error}") from error
