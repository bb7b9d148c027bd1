"""One point of a sweep: build, run the recipe, calibrate, evaluate, record."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from runners.errors import UserError
from runners.launch import CONF, failed_points
from runners.store import RunFolder, fingerprint

log = logging.getLogger(__name__)


def run_point(cfg: DictConfig, *, evaluate: bool = True) -> None:
    """Bring one point to a complete record, unless it has one; a failure is recorded, not raised.

    Heavy imports happen inside, so that a sweep whose points are all complete ends in seconds.
    """
    config = plain(cfg)
    folder = RunFolder(Path(config["results_dir"]) / fingerprint(config))
    label = describe(config)
    try:
        with folder.lock():
            if folder.is_complete() and not config["force"]:
                log.info("%s: complete in %s, skipped (force=true computes it again)", label, folder.path)
                return
            log.info("%s: starting in %s", label, folder.path)
            folder.begin(config)
            try:
                _compute(config, folder)
            except Exception as error:
                _fail(config, folder, error)
                raise
    except UserError as error:
        log.error("%s failed: %s", label, error)
        failed_points.append(f"{label}: {error}")
    except Exception as error:
        log.error("%s failed: %s", label, reason(error), exc_info=True)
        failed_points.append(f"{label}: {reason(error)}")
    finally:
        gc.collect()


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The resolved config as a dictionary; numbers that identify a point in one form."""
    config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(config, dict)
    config.pop("experiment", None)
    config["sparsity"] = 0.0 if config["method"]["name"] == "dense" else float(config["sparsity"])
    return {str(k): v for k, v in config.items()}


def describe(config: Mapping[str, Any]) -> str:
    """Short label of a point for logs."""
    return f"{config['method']['name']} sparsity={config['sparsity']:g} seed={config['seed']}"


def variant(config: Mapping[str, Any]) -> str:
    """What distinguishes this point's method from its file in conf/method, e.g. `bypass=skip`."""
    own = config["method"]
    default = OmegaConf.load(CONF / "method" / f"{own['name']}.yaml")
    raw = OmegaConf.to_container(default, resolve=False)
    assert isinstance(raw, dict)
    changed = [
        f"{key}={value}"
        for key, value in own.items()
        if key in raw and "${" not in str(raw[key]) and raw[key] != value
    ]
    if config["objective"] != "distill":
        changed.append(f"objective={config['objective']}")
    return ", ".join(changed)


def reason(error: BaseException) -> str:
    """One line for a record."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a record that names the point."""
    return {
        "method": config["method"]["name"],
        "variant": variant(config),
        "model": config["model"]["name"],
        "data": config["data"]["name"],
        "seed": config["seed"],
        "sparsity_target": config["sparsity"],
    }


def _fail(config: Mapping[str, Any], folder: RunFolder, error: Exception) -> None:
    text = str(error) if isinstance(error, UserError) else reason(error)
    folder.fail(text, identity(config))


def _compute(config: dict[str, Any], folder: RunFolder) -> None:
    from runners.point import Point
    from runners.tracking import open_tracker

    started = time.perf_counter()
    with open_tracker(config, folder.path, **identity(config)) as tracker:
        point = Point(config, folder, tracker)
        point.train()
        point.save()
        result = {**identity(config), **point.evaluate()}
        result["seconds"] = time.perf_counter() - started
        tracker.summary(result)
        folder.complete(result)
