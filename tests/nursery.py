"""Runs commands in forks of one process that has imported everything, under real faults.

A point of the tiny model takes a second, its imports ten. What runs is the script itself, with
`__main__` as its name, in a process of its own: it may be killed, given a small disk (a tmpfs in a
name space of its own), a limit on memory or on file size, or a clock that jumps.

As a script: reads requests, a JSON line each, and forks.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NEW_USER, NEW_MOUNT, REMOUNT = 0x10000000, 0x00020000, 32


@dataclass
class Step:
    """One run of a script.

    Attributes:
        disk: size of the request's disk from now on, as mount says it (`64k`).
        file_bytes: largest file that may be written.
        spare_mib: memory that may be mapped beyond what imports have taken.
        clock: seconds by which `time.time` jumps to and fro.
        folder: the current one.
        env: the whole environment; None leaves that of the nursery.
    """

    words: list[str]
    script: str = "sweep"
    disk: str | None = None
    file_bytes: int | None = None
    spare_mib: int | None = None
    clock: float | None = None
    folder: str | None = None
    env: dict[str, str] | None = None


@dataclass
class Run:
    """A step that was started; its files lie in `folder`."""

    folder: Path
    parent: subprocess.Popen[str]

    @property
    def pid(self) -> int:
        return int(self._awaited("pid"))

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def running(self) -> bool:
        return not (self.folder / "code").exists()

    def code(self, timeout_s: float = 240) -> int:
        return int(self._awaited("code", timeout_s))

    def _awaited(self, name: str, timeout_s: float = 240) -> str:
        deadline = time.monotonic() + timeout_s
        while not (self.folder / name).exists():
            assert self.parent.poll() is None, "the nursery has ended"
            assert time.monotonic() < deadline, f"no {name}"
            time.sleep(0.01)
        return (self.folder / name).read_text()

    @property
    def stdout(self) -> str:
        return (self.folder / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text()

    @property
    def said(self) -> str:
        return self.stderr + self.stdout

    @property
    def errors(self) -> list[str]:
        return [line for line in self.said.splitlines() if " ERROR " in line]


class Nursery:
    """Starts runs; for as long as a test session needs it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            cwd=folder,
            env={**os.environ, **own},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, *steps: Step, mount: Path | None = None) -> list[Run]:
        """Run the steps one after the other in the background.

        Args:
            mount: where the disk of the steps is; its content after each step is copied to `disk`
                of the step's folder.
        """
        self.count += 1
        folders = [self.folder / f"{self.count}-{i}" for i in range(len(steps))]
        for folder in folders:
            folder.mkdir()
        request = {
            "steps": [asdict(step) for step in steps],
            "folders": [str(folder) for folder in folders],
            "mount": None if mount is None else str(mount),
        }
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return [Run(folder, self.process) for folder in folders]

    def run(self, step: Step) -> Run:
        """One step, finished."""
        (run,) = self.start(step)
        run.code()
        return run

    def close(self) -> None:
        """End it and whatever it was asked for last."""
        self.process.communicate(timeout=60)


def _write(file: Path, value: int) -> None:
    partial = file.with_suffix(".tmp")
    partial.write_text(str(value))
    partial.rename(file)


def _serve() -> None:
    _import_all()
    for line in sys.stdin:
        if os.fork() == 0:
            try:
                _attend(json.loads(line))
            finally:
                os._exit(0)
        while True:  # those that have ended
            try:
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    break
            except ChildProcessError:
                break


def _import_all() -> None:
    import datasets
    import hydra
    import lm_eval.models.huggingface
    import scipy.linalg
    import torch

    import runners.evaluation.harness
    import runners.point
    import runners.sweep
    import runners.tracking

    torch.set_num_threads(1)
    del datasets, hydra, lm_eval, scipy, runners


def _attend(request: dict[str, Any]) -> None:
    """Run the steps of a request, each in a fork, and keep how they ended."""
    mount = request["mount"]
    if mount is not None:
        _own_mounts()
    for index, (step, folder) in enumerate(
        zip(request["steps"], map(Path, request["folders"]), strict=True)
    ):
        if step["disk"] is not None:
            _mount(mount, step["disk"], again=index > 0)
        pid = os.fork()
        if pid == 0:
            _become(step, folder)
        _write(folder / "pid", pid)
        status = os.waitpid(pid, 0)[1]
        if mount is not None:
            shutil.copytree(mount, folder / "disk")
        _write(folder / "code", os.waitstatus_to_exitcode(status))


def _become(step: dict[str, Any], folder: Path) -> None:
    """The script, in this process, which ends here."""
    code: Any = 1
    try:
        for number, name in ((1, "stdout"), (2, "stderr")):
            file = os.open(folder / name, os.O_WRONLY | os.O_CREAT, 0o644)
            os.dup2(file, number)
        sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
        if step["env"] is not None:
            os.environ.clear()
            os.environ.update(step["env"])
        if step["folder"] is not None:
            os.chdir(step["folder"])
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if step["file_bytes"] is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (step["file_bytes"],) * 2)
        if step["spare_mib"] is not None:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + step["spare_mib"] * 2**20
            resource.setrlimit(resource.RLIMIT_AS, (limit,) * 2)
        if step["clock"] is not None:
            _jumping_clock(step["clock"])
        script = ROOT / "runners" / f"{step['script']}.py"
        sys.argv = [str(script), *step["words"]]
        runpy.run_path(str(script), run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with suppress(OSError):  # it may have written as much as it is allowed to
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def _jumping_clock(seconds: float) -> None:
    """Every few looks at the wall clock it is that much earlier or later."""
    real, looks = time.time, 0

    def jumping() -> float:
        nonlocal looks
        looks += 1
        return real() + seconds * (0, 1, -1)[looks // 3 % 3]

    time.time = jumping
    time.time_ns = lambda: int(jumping() * 1e9)


def _own_mounts() -> None:
    user, group = os.getuid(), os.getgid()
    _call("unshare", NEW_USER | NEW_MOUNT)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")


def _mount(place: str, size: str, *, again: bool) -> None:
    flags = REMOUNT if again else 0
    _call("mount", b"none", place.encode(), b"tmpfs", flags, f"size={size}".encode())


def _call(name: str, *arguments: Any) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        raise OSError(ctypes.get_errno(), name)


def can_mount() -> bool:
    """True where a process may have mounts of its own."""
    if os.fork() == 0:
        try:
            _own_mounts()
            _mount("/mnt", "64k", again=False)
        except OSError:
            os._exit(1)
        os._exit(0)
    return os.wait()[1] == 0


if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # instead of tests/, whose folders have the names of our packages
    _serve()
