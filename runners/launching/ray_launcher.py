"""Points of a sweep as tasks of a Ray cluster: `hydra/launcher=ray`.

No plugin of its own is installed for it: what a sweep needs is this much.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from hydra.core.utils import (
    JobReturn,
    configure_log,
    filter_overrides,
    run_job,
    setup_globals,
)
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from runners.errors import UserError
from runners.runtime.signals import Interrupted, handled
from runners.runtime.workers import POINTS, VARIABLE, end_points

log = logging.getLogger(__name__)

PASSED_ON = (
    VARIABLE,
    POINTS,
    "OMP_NUM_THREADS",
    "ROUTEBENCH_CACHE_DIR",
    "WANDB_API_KEY",
    "HF_HOME",
)
"""Variables of the environment that a worker needs as they are here."""


@dataclass
class RayOptions:
    """`hydra.launcher`: what a point needs of the cluster."""

    _target_: str = "hydra_plugins.routebench.RayLauncher"
    address: str | None = None
    """Of a running cluster (`auto` finds it); None starts one on this machine."""
    workers: int | None = None
    """CPUs of the cluster that is started here; None for all of the machine."""
    cpus: float = 1.0
    """That a point reserves; also its threads, if OMP_NUM_THREADS does not say otherwise."""
    gpus: float = 0.0


class RayLauncher(Launcher):
    """Runs every point of a batch as one Ray task, as many at a time as the cluster has room for.

    Args: see `RayOptions`.
    """

    __module__ = "hydra_plugins.routebench"  # Hydra takes plugins from there only

    def __init__(self, address: str | None, workers: int | None, cpus: float, gpus: float) -> None:
        self.address, self.workers, self.cpus, self.gpus = address, workers, cpus, gpus
        self.config: DictConfig | None = None
        self.task_function: TaskFunction | None = None
        self.hydra_context: HydraContext | None = None

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """As Hydra asks of every launcher."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run the points; returns when all have ended.

        Raises:
            UserError: Ray is not installed, or its cluster cannot be reached.
        """
        assert self.config is not None
        ray = _ray()
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        Path(str(self.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        self._connect(ray)
        try:
            task = ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, max_retries=0)(_run)
            state, waiting = Singleton.get_state(), []
            for index, overrides in enumerate(job_overrides, initial_job_idx):
                log.info("\t#%d : %s", index, " ".join(filter_overrides(overrides)))
                parts = (self.hydra_context, self.task_function, self.config)
                waiting.append(task.remote(index, list(overrides), parts, state))
            return _finished(ray, waiting)
        finally:
            ray.shutdown()

    def _connect(self, ray: Any) -> None:
        variables = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        variables.setdefault("OMP_NUM_THREADS", str(max(1, int(self.cpus))))
        root = str(Path(__file__).resolve().parents[2])
        variables["PYTHONPATH"] = os.pathsep.join(
            filter(None, [root, os.environ.get("PYTHONPATH", "")])
        )
        try:
            ray.init(
                address=self.address,
                num_cpus=self.workers if self.address is None else None,
                include_dashboard=False,
                log_to_driver=True,
                runtime_env={"env_vars": variables},
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UserError(
                f"no Ray cluster at {self.address or 'this machine'}: {error}"
            ) from None


def _finished(ray: Any, waiting: list[Any]) -> list[JobReturn]:
    """The points, all ended, or ended by a signal to this process.

    Raises:
        Interrupted: there was one.
    """
    asked: list[int] = []
    # Ray has handlers of its own, which end the workers at once
    with handled(lambda number, _: asked.append(number)):
        while not asked and ray.wait(waiting, num_returns=len(waiting), timeout=0.2)[1]:
            pass
        if not asked:
            found: list[JobReturn] = ray.get(waiting)
            return found
        end_points(asked[0])
    raise Interrupted(asked[0])


def _ray() -> Any:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # else points give way to everything
    try:
        import ray
    except ImportError as error:
        raise UserError(
            f"hydra/launcher=ray cannot import ray ({error}): pip install ray"
        ) from None
    return ray


def _run(index: int, overrides: list[str], parts: Any, state: Any) -> JobReturn:
    """One point, in a worker."""
    context, task_function, config = parts
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Ray's own would not let the point end in order
    setup_globals()
    Singleton.set_state(state)
    own = context.config_loader.load_sweep_config(config, overrides)
    with open_dict(own):
        own.hydra.job.id, own.hydra.job.num = f"{own.hydra.job.name}_{index}", index
    HydraConfig.instance().set_config(own)
    return run_job(
        hydra_context=context,
        config=own,
        task_function=task_function,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
    )


def register() -> None:
    """Make `hydra/launcher=ray` known to Hydra; Ray itself is imported when points start."""
    plugin = ModuleType(RayLauncher.__module__)
    plugin.RayLauncher = RayLauncher  # type: ignore[attr-defined]
    try:
        plugins = import_module("hydra_plugins")
    except ImportError:
        plugins = sys.modules["hydra_plugins"] = ModuleType("hydra_plugins")
    plugins.routebench = plugin  # type: ignore[attr-defined]
    sys.modules[plugin.__name__] = plugin
    Plugins.instance().register(RayLauncher)
    ConfigStore.instance().store(
        group="hydra/launcher", name="ray", node=RayOptions, provider="routebench"
    )
