"""End a run where nothing is lost, within seconds of a signal that asks for it.

A gradient stage defers signals to the end of the micro-batch that runs, writes a checkpoint and
obeys; everything else has nothing to keep and obeys at once.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

ASKING = (signal.SIGTERM, signal.SIGINT)
OTHERS = tuple(getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2") if hasattr(signal, name))
"""Some launchers (submitit) announce the end with these; without a handler they mean nothing."""


class Interrupted(SystemExit):
    """A signal ended the run; the exit code is 128 + its number, as a shell would say it."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number).name


class Stop:
    """What signals have asked for."""

    def __init__(self) -> None:
        self.number: int | None = None
        """Of a signal that has come and is not obeyed yet."""
        self.deferring = self.ending = False
        self.before: dict[int, Any] = {}
        """Handlers of before `listening`."""

    def receive(self, number: int, frame: Any = None) -> None:
        """The handler. A second Ctrl-C does not wait for the checkpoint; a second SIGTERM, as the
        sweep and a scheduler may both send one, does not disturb the end."""
        if self.ending and number == signal.SIGTERM:
            return
        again, self.number = self.number is not None, number
        if not self.deferring or (again and number == signal.SIGINT):
            self.obey()

    def obey(self) -> None:
        """End as the last signal asks; a launcher's own handler decides, if there is one.

        Raises:
            Interrupted: there is none.
        """
        number, self.number = self.number, None
        if number is None:
            return
        own: Any = self.before.get(number)
        if not _is_foreign(own):
            self.ending = True
            raise Interrupted(number)
        own(number, None)


_stop = Stop()


@contextmanager
def listening() -> Iterator[None]:
    """Handle the signals inside the block; only a process's main thread can."""
    if _stop.before or threading.current_thread() is not threading.main_thread():
        yield
        return
    for number in (*ASKING, *OTHERS):
        own = signal.getsignal(number)
        if _is_foreign(own) or (number in ASKING and own is not signal.SIG_IGN):
            _stop.before[number] = signal.signal(number, _stop.receive)
    try:
        yield
    finally:
        for number, own in _stop.before.items():
            signal.signal(number, own)
        left = _stop.number
        _stop.number, _stop.ending, _stop.before = None, False, {}
        if left is not None:  # it came while the point failed
            signal.raise_signal(left)


@contextmanager
def deferred() -> Iterator[Stop]:
    """Note a signal inside the block; who runs there looks at `number` and calls `obey`."""
    _stop.deferring = True
    try:
        yield _stop
    finally:
        _stop.deferring = False
    _stop.obey()


@contextmanager
def handled(handler: Callable[[int, Any], Any]) -> Iterator[None]:
    """Give the signals that ask a run to end to `handler` inside the block."""
    before = {number: signal.signal(number, handler) for number in ASKING}
    try:
        yield
    finally:
        for number, own in before.items():
            signal.signal(number, own)


def _is_foreign(handler: Any) -> bool:
    """Whether somebody installed it, as submitit does: it is not Python's or the system's own."""
    return callable(handler) and handler is not signal.default_int_handler
