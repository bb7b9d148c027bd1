"""One line that says what a run is doing: redrawn in a terminal, written every 30 s into a log."""

from __future__ import annotations

import logging
import shutil
import sys
import threading
import time
from collections.abc import Collection, Iterable
from typing import Any, TypeVar

from tqdm import tqdm

from runners.runtime.processes import is_main_process
from runners.runtime.workers import alone

log = logging.getLogger(__name__)

T = TypeVar("T")

EVERY_S = 30.0
"""Of silence in a log, after which the line is written."""
REDRAWN_S = 1.0
"""Between two drawings in a terminal, at most; a part that ends sooner is not drawn."""
CLEAR = "\r\x1b[2K"
"""Moves a terminal to the start of its line, and empties the line."""
COUNTED = "{desc} {n_fmt} of {total_fmt}{postfix}, {remaining} left"
NAMED = "{desc}{postfix}"

_open: list[Bar] = []
"""What the line speaks of, from the point to the smallest part."""
_last_line = 0.0
"""When the console last got a line, `time.monotonic` seconds."""


class Bar(tqdm):
    """A named part of the work, counted if it has a total; parts within parts share the line.

    Takes the place of tqdm where a library draws bars; what else it asks for is ignored.

    Args:
        iterable: counted while it is iterated over; or `update` counts.
        desc: name.
        total: of the count; None for that of the iterable, or no count.
        initial: what was counted before.
    """

    monitor_interval = 0

    def __init__(
        self,
        iterable: Iterable[Any] | None = None,
        desc: str | None = None,
        total: int | None = None,
        initial: int = 0,
        **_: Any,
    ) -> None:
        # points side by side would draw over each other: their lines are those of a log
        self.shown = sys.stdout.isatty() and is_main_process() and alone()
        # tqdm would cut each part to the terminal's width
        how: dict[str, Any] = {"file": sys.stdout, "delay": REDRAWN_S, "position": 0, "ncols": 999}
        super().__init__(iterable, desc or "items", total, leave=False, initial=initial, **how)
        self.bar_format = NAMED if self.total is None else COUNTED
        _open.append(self)
        if len(_open) == 1:
            threading.Thread(target=_keep_saying, args=(self,), daemon=True).start()
        if self.total is None:
            self.refresh()

    def __eq__(self, other: object) -> bool:
        return self is other  # tqdm compares places on the screen

    __hash__ = object.__hash__

    def close(self) -> None:
        """End this part, and those within it that an exception has left open."""
        if _open is None:  # a bar that is still open as the interpreter ends
            return
        if self in _open:
            del _open[_open.index(self) :]
        self.disable = True
        self._instances.discard(self)  # nothing moves up: the line stays until another is drawn
        if not _open:
            self.clear()

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Draw the line of all open parts, whichever of them asks."""
        if self.shown:
            self.fp.write(CLEAR + line(shutil.get_terminal_size().columns))
            self.fp.flush()

    def clear(self, nolock: bool = False) -> None:
        """Empty the line."""
        if self.shown:
            self.fp.write(CLEAR)
            self.fp.flush()


class Console(logging.StreamHandler):
    """Writes a log's lines above the line that a terminal redraws."""

    def emit(self, record: logging.LogRecord) -> None:
        """As every handler."""
        global _last_line
        with Bar.external_write_mode(self.stream):
            super().emit(record)
        _last_line = time.monotonic()


def progress(items: Collection[T], label: str) -> Bar:
    """Iterate over items; the line counts them."""
    return Bar(items, label)


def note(figures: str) -> None:
    """Put figures beside the name of the innermost open part."""
    if _open:
        _open[-1].set_postfix_str(figures, refresh=False)


def line(width: int | None = None) -> str:
    """What runs, `informed sparsity=0.5 seed=0: routers 30 of 100, loss 0.21, 00:41 left`.

    Args:
        width: columns; the outer parts are left out where not all fit.
    """
    parts = list(_open)
    said = [str(part) for part in parts]
    if parts and parts[-1].total is None:
        elapsed = time.time() - parts[-1].start_t
        said[-1] += f", {Bar.format_interval(elapsed)}"
    while width is not None and len(said) > 1 and len(": ".join(said)) >= width:
        said.pop(0)
    return ": ".join(said)[: None if width is None else width - 1]


def _keep_saying(outermost: Bar) -> None:
    """Draw the line again, or write it into a log that was silent, until the outermost part ends.

    A step may take minutes: no bar would be asked to draw itself then.
    """
    began = time.monotonic()
    while outermost in _open:
        time.sleep(min(REDRAWN_S, EVERY_S))
        if outermost.shown and outermost in _open:
            outermost.refresh()
        elif outermost in _open and time.monotonic() - max(began, _last_line) >= EVERY_S:
            began = time.monotonic()
            log.info("%s", line())
