"""One point of a sweep: build, run the recipe, calibrate, evaluate, record."""

from __future__ import annotations

import gc
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from runners.base_model.embedded import sha256_of
from runners.errors import UserError
from runners.launching.command_line import CONF
from runners.runtime import processes
from runners.runtime.signals import Interrupted, listening
from runners.runtime.workers import at_work, note_failure
from runners.store.files import full_disk
from runners.store.run_folder import RunFolder, fingerprint
from runners.store.summary import drift, headline

if TYPE_CHECKING:
    from runners.point import Point
    from runners.tracking.base import Safe

log = logging.getLogger(__name__)


def run_point(cfg: DictConfig, *, evaluate: bool = True) -> None:
    """Bring one point to a complete record, unless it has one; a failure is recorded, not raised.

    Heavy imports happen inside, so that a sweep whose points are all complete ends in seconds.

    Args:
        evaluate: False stops after saving; the folder then holds `routed/` and no record.
    """
    config = plain(cfg)
    _recorded(config, lambda folder: _train_and_score(config, folder, evaluate=evaluate))


def score_saved(cfg: DictConfig) -> None:
    """Evaluate a saved routed model into a record of its own."""
    config = plain(with_saved(cfg))
    _recorded(config, lambda folder: _score(config, folder))


def measure_speed(cfg: DictConfig) -> None:
    """Time a point's routed model against the dense one; the record gets the key `speed`."""
    config = plain(cfg)
    folder = RunFolder(Path(config["results_dir"]) / fingerprint(config))
    label = f"speed of {describe(config)}"
    with _caught(label), listening(), at_work(), folder.lock():
        if processes.world_size() > 1:
            raise UserError("speed is measured in one process: start it without a launcher")
        if not folder.config_file.exists():
            folder.begin(config)
        log.info("%s: starting in %s", label, folder.path)
        _time(config, folder)


def _time(config: dict[str, Any], folder: RunFolder) -> None:
    from runners.point import Point
    from runners.timing.measure import measure
    from runners.tracking.base import open_tracker
    from runners.tracking.mirror import mirror_speed

    with open_tracker(config, folder.path, job="speed", **identity(config)) as tracker:
        point = Point(config, folder, tracker)
        if config["speed"]["trained"]:
            point.train()
        figures = measure(point, config["speed"])
        folder.add_speed(figures["speed"], {**identity(config), **figures["record"]})
        mirror_speed(tracker, figures["speed"])


@contextmanager
def _caught(label: str) -> Iterator[None]:
    """One failed point never stops a sweep: it is logged and remembered for the exit code."""
    try:
        yield
    except Interrupted as stopped:
        log.error("%s stopped by %s; the same command goes on from here", label, stopped.signal)
        raise
    except UserError as error:
        log.error("%s failed: %s", label, error)
        note_failure(f"{label}: {error}")
    except Exception as error:
        log.error("%s failed: %s", label, reason(error), exc_info=True)
        note_failure(f"{label}: {reason(error)}")
    else:
        return
    finally:
        gc.collect()
    if (
        processes.world_size() > 1
    ):  # the others may wait for this one for ever; the launcher ends them
        raise SystemExit(1)


def _recorded(config: dict[str, Any], work: Callable[[RunFolder], None]) -> None:
    config = processes.own(config)
    folder = RunFolder(Path(config["results_dir"]) / fingerprint(config))
    label = describe(config)
    with _caught(label), listening(), at_work(), folder.lock():
        if _agreed(config, partial(_to_skip, config, folder)):
            log.info(
                "%s: complete in %s, skipped (force=true computes it again)", label, folder.path
            )
            return
        log.info("%s: starting in %s", label, folder.path)
        folder.begin(config)
        try:
            work(folder)
        except Interrupted as stopped:
            folder.interrupted(stopped.signal)
            raise
        except Exception as raised:
            known = full_disk(folder.path, raised) or too_little_memory(raised)
            error = known or fault_of_method(raised) or raised
            mistake = isinstance(error, UserError)
            with suppress(OSError, UserError):  # a full disk; the console says why it failed
                folder.fail(str(error) if mistake else reason(error), identity(config))
            raise error from raised.__cause__


def _to_skip(config: Mapping[str, Any], folder: RunFolder) -> bool:
    """Whether the point has its record.

    Raises:
        UserError: it failed before and is not to be tried again.
    """
    folder.discard_damaged()
    if folder.is_complete() and not config["force"]:
        return True
    why = folder.failed()
    if why and not (config["retry_failed"] or config["force"]):
        raise UserError(f"it did before ({why}); retry_failed=true tries again")
    return False


def _agreed(config: Mapping[str, Any], find: Callable[[], bool]) -> bool:
    """What the first of the launched processes finds; alone, what `find` gives."""
    if processes.world_size() == 1:
        return find()
    from runners.runtime.distributed import broadcast_object, join

    join(config["device"])
    return broadcast_object(find)


def too_little_memory(error: Exception) -> UserError | None:
    """The user's version of a failed allocation."""
    from runners.runtime.memory import out_of_memory

    if not out_of_memory(error):
        return None
    first = str(error).strip().splitlines()[0] if str(error).strip() else "no more is known"
    return UserError(f"out of memory ({first}): smaller batches, or a larger device")


def fault_of_method(error: Exception) -> UserError | None:
    """The user's version of a target out of a method's reach, or of a method's own mistake."""
    from methods.base import BrokenContract, OutOfReach

    return UserError(str(error)) if isinstance(error, (BrokenContract, OutOfReach)) else None


def _train_and_score(config: dict[str, Any], folder: RunFolder, *, evaluate: bool) -> None:
    from runners.point import Point
    from runners.tracking.base import open_tracker

    started = time.perf_counter()
    job = "sweep" if evaluate else "train"
    with open_tracker(config, folder.path, job=job, **identity(config)) as tracker:
        point = Point(config, folder, tracker)
        point.train()
        point.save()
        if evaluate:
            _finish(config, folder, tracker, point, started)
        else:
            folder.saved()
            log.info("saved %s", folder.path / "routed")


def _score(config: dict[str, Any], folder: RunFolder) -> None:
    from runners.point import Point
    from runners.tracking.base import open_tracker

    started = time.perf_counter()
    with open_tracker(config, folder.path, job="score", **identity(config)) as tracker:
        point = Point(config, folder, tracker)
        point.restore(Path(config["saved"]), recalibrate=config["recalibrate"])
        _finish(config, folder, tracker, point, started)


def _finish(
    config: dict[str, Any], folder: RunFolder, tracker: Safe, point: Point, started: float
) -> None:
    from runners.tracking.mirror import mirror

    result = {**identity(config), **point.evaluate()}
    result["seconds"] = time.perf_counter() - started
    folder.complete(result)
    mirror(tracker, folder.path, result)
    log.info("%s: %s", describe(config), headline(result))
    if said := drift(result):
        log.warning("%s: %s", describe(config), said)


def with_saved(cfg: DictConfig) -> DictConfig:
    """Fill the method and the model of a score config from the saved folder's JSON.

    Raises:
        UserError: no saved routed model there.
    """
    try:
        settings = json.loads((Path(cfg.saved) / "routed.json").read_text())
        target, options, base = settings["target"], settings["options"], settings["base"]
        content = sha256_of(Path(cfg.saved) / "routed.safetensors")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"saved={cfg.saved} holds no saved routed model (routed.json)") from error
    model = {k: base[k] for k in ("name", "source", "path", "revision")}
    if cfg.base_model is not None:
        path = str(cfg.base_model)
        model = {"name": path, "source": "pretrained", "path": path, "revision": None}
    own = {k: v for k, v in options.items() if k != "sparsity"}
    name = target.rsplit(".", 2)[-2]
    moved = cfg.sparsity is not None
    filled = {
        "method": {"name": name, "_target_": target, **own},
        "model": {**model, "trust_remote_code": False},
        "sparsity": cfg.sparsity if moved else options["sparsity"],
        "recalibrate": moved,
        "seed": base["seed"] if cfg.seed is None else cfg.seed,
        "saved_sha256": content,
        "trained_on_sha256": base["weights_sha256"],
    }
    OmegaConf.set_struct(cfg, False)
    merged = OmegaConf.merge(cfg, filled)
    assert isinstance(merged, DictConfig)
    return merged


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
