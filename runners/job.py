"""One point's life: skip it or hold it, do its work, keep its record or why it failed."""

from __future__ import annotations

import atexit
import gc
import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from runners.content import with_content
from runners.errors import UserError
from runners.point_config import Phase, PointConfig, TrackingConfig, resolve
from runners.runtime.processes import is_main_process, world_size
from runners.runtime.progress import Bar
from runners.runtime.signals import Interrupted, listening
from runners.runtime.workers import POINTS, alone, at_work, note_end, note_failure
from runners.store.files import full_disk
from runners.store.record import Record
from runners.store.run_folder import RunFolder

if TYPE_CHECKING:
    from runners.point import Built
    from runners.timing.measure import Cases
    from runners.tracking.base import Safe

log = logging.getLogger(__name__)

Job = Literal["sweep", "train", "score"]
_seconds: list[float] = []
"""Of each point that this process has worked on."""


def run_point(cfg: DictConfig, job: Job = "sweep") -> None:
    """Bring one point to its record, unless it has one; a failure is recorded, not raised.

    Heavy imports happen inside, so that a sweep whose points are all complete ends in seconds.

    Args:
        job: `train` stops after saving; the folder then holds `routed/` and no record. `score`
            evaluates a saved routed model.
    """
    config = _of_this_process(with_content(PointConfig.parse(resolve(cfg))))
    folder = RunFolder(Path(config.store.results_dir) / config.fingerprint)
    label, place, began = config.label, _place(), time.perf_counter()
    with Bar(desc=label), _caught(label), listening(), at_work(), folder.lock():
        built, anew = None, not _agreed(config, partial(_to_skip, config, folder))
        if not anew:
            said = "%s%s: complete in %s, skipped (force=true computes it again)"
            log.info(said, place, label, folder.path)
            if job != "train" and _ungenerated(config, folder):
                log.info("%s: adding what it generates to its record", label)
                built = _generate(config, folder)
        else:
            named = f"{label} ({config.variant})" if config.variant else label
            log.info("%s%s: starting in %s", place, named, folder.path)
            folder.begin(config.redacted)
            built = _run_anew(config, folder, job)
        if job == "sweep" and not anew and (cases := _untimed(config, folder)):
            log.info("%s: timing it", label)
            with _tracked(config, folder, "speed") as tracker:
                _time(config, folder, cases, tracker, built)
        if built is not None:
            _seconds.append(time.perf_counter() - began)
    if folder.result_file.is_file():
        note_end(folder.path)


def _place() -> str:
    """`point 2 of 3, about 04:10 left: ` in a sweep; the time where it runs in this process."""
    hydra: Any = HydraConfig.instance().cfg
    number = None if hydra is None else OmegaConf.select(hydra, "hydra.job.num")
    count = int(os.environ.get(POINTS, "1"))
    if number is None or count == 1:
        return ""
    said = f"point {number + 1} of {count}"
    if _seconds and alone():
        left = fmean(_seconds) * (count - number)
        said += f", about {Bar.format_interval(left)} left"
    return f"{said}: "


def _run_anew(config: PointConfig, folder: RunFolder, job: Job) -> Built:
    """Work on a point, and time it if its sweep does, in one run of the tracker."""
    with _tracked(config, folder, job) as tracker:
        with _failure_recorded(config, folder):
            built = _work(config, folder, job, tracker)
        # a failure from here on leaves the record of the quality as it is
        if job == "sweep" and (cases := _untimed(config, folder, again=True)):
            _time(config, folder, cases, tracker, built)
    return built


def _work(config: PointConfig, folder: RunFolder, job: Job, tracker: Safe) -> Built:
    """Build, train and calibrate, save, evaluate, record."""
    from runners import point
    from runners.tracking.mirror import mirror

    began = time.perf_counter()
    built = point.build(config)
    if config.saved is None:
        trained = point.train(config, built, folder, tracker)
        point.save(config, built, folder.path / "routed")
    else:
        trained = point.restore(config, config.saved, built)
    if job == "train":
        folder.saved()
        log.info("saved %s", folder.path / "routed")
        return built
    scores = point.evaluate(config, built, folder)
    record = point.record(config, built, trained, scores, time.perf_counter() - began)
    folder.complete(record)
    mirror(tracker, folder.path, record.to_json())
    log.info("%s: %s", config.label, record.headline)
    for line in record.warnings:
        log.warning("%s: %s", config.label, line)
    return built


def _ungenerated(config: PointConfig, folder: RunFolder) -> bool:
    """Whether a complete point's record lacks what is asked to be generated; never of several
    processes, whose scratch folders have no record."""
    settings = config.eval.generation
    if settings is None or world_size() > 1:
        return False
    return not folder.has_generation(asdict(settings))


def _generate(config: PointConfig, folder: RunFolder) -> Built:
    """Add to a complete point's record what its routed model, as it was saved, generates."""
    from runners import point
    from runners.tracking.base import Safe

    built = point.build(config)
    point.train_again(config, built, folder, Safe(None))
    generated = point.generate(config, built, folder)
    assert generated is not None
    folder.add_generation(generated)
    return built


def _untimed(
    config: PointConfig, folder: RunFolder, *, again: bool = False
) -> list[tuple[Phase, dict[str, int]]]:
    """The cases that a point of a sweep is still to be timed in; all of them if `again`."""
    speed = config.speed
    if speed is None or not speed.in_sweep:
        return []
    how = {key: getattr(speed, key) for key in ("decisions", "trained", "kernels", "neighbours")}
    return [
        (phase, size)
        for phase, size in speed.cases()
        if again or not folder.is_timed(phase, {**size, **how})
    ]


def calibration_loss(cfg: DictConfig) -> float:
    """Train and calibrate a point; the test text is not read, and there is no record.

    Returns:
        LM loss of the routed model on calibration text, nats a token; infinite if it failed.
    """
    from runners import point

    config = with_content(PointConfig.parse(resolve(cfg)))
    folder = RunFolder(Path(config.store.results_dir) / config.fingerprint)
    label = f"tuning {config.label}"
    with _caught(label), listening(), at_work(), folder.lock():
        if not folder.config_file.exists():
            folder.begin(config.redacted)
        with _tracked(config, folder, "tune") as tracker:
            built = point.build(config)
            trained = point.train(config, built, folder, tracker)
            loss = built.probe.routed_loss()
        folder.log({"event": "tuned", "loss": loss, "realised": trained.realised})
        log.info("%s: %s: loss %.4f on calibration text", label, config.variant, loss)
        return loss
    return math.inf


def measure_speed(cfg: DictConfig) -> None:
    """Time a point's routed model against the dense one; the record gets the key `speed`."""
    config = with_content(PointConfig.parse(resolve(cfg)))
    folder = RunFolder(Path(config.store.results_dir) / config.fingerprint)
    label = f"speed of {config.label}"
    with _caught(label), listening(), at_work(), folder.lock():
        if world_size() > 1:
            raise UserError("speed is measured in one process: start it without a launcher")
        if not folder.config_file.exists():
            folder.begin(config.redacted)
        log.info("%s: starting in %s", label, folder.path)
        assert config.speed is not None
        with _tracked(config, folder, "speed") as tracker:
            _time(config, folder, config.speed.cases(), tracker)


def _time(
    config: PointConfig,
    folder: RunFolder,
    cases: Cases,
    tracker: Safe,
    ready: Built | None = None,
) -> None:
    """Time cases; each is kept in the record as soon as it is timed.

    Args:
        ready: trained; None builds the point, with what it saved or with the stages' products.
    """
    from runners import point
    from runners.timing.measure import measure, unevaluated
    from runners.tracking.mirror import mirror_speed

    speed = config.speed
    assert speed is not None
    built, stages = ready or point.build(config), []
    if speed.trained and ready is None:
        stages = point.train_again(config, built, folder, tracker).stages
    base, method = built.base, built.method
    try:
        for phase, case in measure(speed, cases, config.data, config.seed, base, method):
            folder.add_speed(phase, case, unevaluated(config, base, method, stages, case))
    finally:  # those that were timed before it was stopped too
        mirror_speed(tracker, folder.speed())


def _tracked(config: PointConfig, folder: RunFolder, job: str) -> AbstractContextManager[Safe]:
    from runners.tracking import open_tracker

    redacted, identity = config.redacted, config.identity
    return open_tracker(config.tracking, folder.path, job=job, identity=identity, config=redacted)


@contextmanager
def _caught(label: str) -> Iterator[None]:
    """Log a failed point and remember it for the exit code: it never stops a sweep."""
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
    if world_size() > 1:  # the others may wait for this one for ever; the launcher ends them
        raise SystemExit(1)


@contextmanager
def _failure_recorded(config: PointConfig, folder: RunFolder) -> Iterator[None]:
    """Keep in the point's folder why its work ended early; the error goes on."""
    try:
        yield
    except Interrupted as stopped:
        folder.interrupted(stopped.signal)
        raise
    except Exception as raised:
        known = full_disk(folder.path, raised) or too_little_memory(raised)
        error = known or fault_of_method(raised) or raised
        said = str(error) if isinstance(error, UserError) else reason(error)
        with suppress(OSError, UserError):  # a full disk; the console says why it failed
            folder.fail(Record(**config.identity, status="failed", reason=said))
        raise error from raised.__cause__


def _to_skip(config: PointConfig, folder: RunFolder) -> bool:
    """Whether the point has its record.

    Raises:
        UserError: it failed before and is not to be tried again.
    """
    folder.discard_damaged()
    if folder.is_complete() and not config.store.force:
        return True
    why = folder.failed()
    if why and not (config.store.retry_failed or config.store.force):
        raise UserError(f"it did before ({why}); retry_failed=true tries again")
    return False


def _of_this_process(config: PointConfig) -> PointConfig:
    """The config of a process that others were launched with: only the first writes where the
    user looks, and only it tracks and keeps checkpoints."""
    if is_main_process():
        return config
    logging.getLogger().setLevel(logging.WARNING)
    scratch = tempfile.mkdtemp(prefix="routebench-")
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    store = replace(config.store, results_dir=scratch, checkpoint_seconds=None)
    return replace(config, store=store, tracking=TrackingConfig("off"))


def _agreed(config: PointConfig, find: Callable[[], bool]) -> bool:
    """What the first of the launched processes finds; alone, what `find` gives."""
    if world_size() == 1:
        return find()
    from runners.runtime.distributed import broadcast_object, join

    join(config.placement.device)
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


def reason(error: BaseException) -> str:
    """One line for a record."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
