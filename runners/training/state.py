"""Keep what a gradient stage needs to go on: to begin a step again, or after a kill."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from methods.base import Method
from runners.errors import UserError
from runners.runtime.distributed import broadcast_object
from runners.store.files import Damaged, read_tensors, write_tensors

log = logging.getLogger(__name__)

METHOD, OPTIMIZER, ORDER = "method.", "optimizer.", "data.order"
CUDA, TORCH = "random.cuda", "random.torch"

Saved = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors of a checkpoint, on the host, and the rest as JSON values."""


@dataclass
class Position:
    """How far a stage is."""

    thresholds: dict[float, float]
    """By target; where the next step at it decides."""
    micro_batch: int
    """Rows of a pass."""
    step: int = 0
    """Finished steps."""
    loss: float | None = None
    """Of the last step."""
    oom_halvings: int = 0
    """How often memory did not suffice for the micro-batch."""
    shares: dict[float, float] = field(default_factory=dict)
    """By target; the share of the scores that its threshold is to lie above, where it is held."""
    curve: list[dict[str, float]] = field(default_factory=list)
    """Figures of the finished steps."""


class Batches:
    """Endless batches of token rows: every row once an epoch, in an order drawn anew for each.

    Args:
        rows: int64 [n, seq_len].
        size: rows of a batch.
        device: where batches go.

    Raises:
        UserError: fewer rows than a batch has.
    """

    def __init__(self, rows: Tensor, size: int, device: torch.device) -> None:
        if len(rows) < size:
            raise UserError(
                f"the training text gives {len(rows)} rows of {rows.shape[1]} tokens, fewer than "
                f"a batch of {size}: give more text or a smaller budget"
            )
        self.rows, self.size, self.device = rows, size, device
        self.order = self._shuffled()
        """Rows to come, int64; replaced and never written to, so that who holds it can go back."""

    def __next__(self) -> Tensor:
        while len(self.order) < self.size:
            self.order = torch.cat([self.order, self._shuffled()])
        batch = self.rows[self.order[: self.size]].to(self.device)
        self.order = self.order[self.size :]
        return batch

    def _shuffled(self) -> Tensor:
        return broadcast_object(lambda: torch.randperm(len(self.rows)))


@dataclass(frozen=True)
class RandomState:
    """Every generator that training may draw from, at one moment."""

    tensors: dict[str, Tensor]
    """torch's, on the host and on a CUDA device."""
    host: list[Any]
    """Python's and NumPy's, as JSON values."""

    @classmethod
    def take(cls, device: torch.device) -> RandomState:
        """As it is now."""
        tensors = {TORCH: torch.get_rng_state()}
        if device.type == "cuda":
            tensors[CUDA] = torch.cuda.get_rng_state(device)
        numpys: Any = numpy.random.get_state()
        return cls(tensors, [random.getstate(), [numpys[0], numpys[1].tolist(), *numpys[2:]]])

    def put(self, device: torch.device) -> None:
        """Make every generator go on from here."""
        torch.set_rng_state(self.tensors[TORCH])
        if device.type == "cuda":
            torch.cuda.set_rng_state(self.tensors[CUDA], device)
        (version, words, gauss), numpys = self.host
        random.setstate((version, tuple(words), gauss))
        numpy.random.set_state(tuple(numpys))


class StageState:
    """The parts of a stage that change from step to step.

    Args:
        method: its buffers and `parameters` are all that changes of the model.
        parameters: those that train.
        adamw: their optimiser, its learning rate a function of the step.
        batches: where the data comes from.
        at: the start.
    """

    def __init__(
        self,
        method: Method,
        parameters: Sequence[nn.Parameter],
        adamw: torch.optim.AdamW,
        batches: Batches,
        at: Position,
    ) -> None:
        self.method, self.parameters, self.adamw = method, parameters, adamw
        self.batches, self.at = batches, at

    def begin_step(self) -> None:
        """Remember where the data and the generators are; all else moves at the step's end."""
        self.order, self.random = self.batches.order, RandomState.take(self.batches.device)

    def rewind(self) -> None:
        """Back to where the step began; its gradients are dropped."""
        self.adamw.zero_grad(set_to_none=True)
        self.batches.order = self.order
        self.random.put(self.batches.device)

    def halve(self, stage: str) -> None:
        """Half the rows a pass, because memory did not suffice.

        Raises:
            UserError: a single row is too much.
        """
        at, rows = self.at, self.batches.rows
        if at.micro_batch == 1:
            raise UserError(
                f"stage {stage}: out of memory with a micro-batch of one row of {rows.shape[1]} "
                "tokens; give the stage shorter rows (seq_len of its budget) or a larger device"
            )
        at.micro_batch = (at.micro_batch + 1) // 2
        at.oom_halvings += 1
        log.warning("stage %s: out of memory; micro-batch now %d rows", stage, at.micro_batch)

    def save(self) -> Saved:
        """All that the next step depends on, as it was when the step began."""
        trained = {id(parameter) for parameter in self.parameters}
        found = {METHOD + k: v for k, v in self.method.named_buffers()}
        found |= {METHOD + k: v for k, v in self.method.named_parameters() if id(v) in trained}
        for index, moments in self.adamw.state_dict()["state"].items():
            found |= {f"{OPTIMIZER}{index}.{key}": value for key, value in moments.items()}
        tensors = {**found, ORDER: self.order, **self.random.tensors}
        return tensors, {"position": asdict(self.at), "random": self.random.host}

    def restore(self, saved: Saved) -> None:
        """Go on from what `save` gave in another process."""
        tensors, about = saved
        own = {**dict(self.method.named_buffers()), **dict(self.method.named_parameters())}
        moments: dict[int, dict[str, Tensor]] = {}
        with torch.no_grad():
            for name, value in tensors.items():
                if name.startswith(METHOD):
                    own[name.removeprefix(METHOD)].copy_(value)
                elif name.startswith(OPTIMIZER):
                    index, _, key = name.removeprefix(OPTIMIZER).partition(".")
                    moments.setdefault(int(index), {})[key] = value
        self.adamw.load_state_dict({**self.adamw.state_dict(), "state": moments})
        position = about["position"]
        for name in ("thresholds", "shares"):
            position[name] = {float(target): value for target, value in position[name].items()}
        self.at = Position(**position)
        self.batches.order = tensors[ORDER]
        RandomState(tensors, about["random"]).put(self.batches.device)


class Checkpoint:
    """File that a killed stage goes on from.

    Args:
        path: None keeps none.
        seconds: of work between two; None writes one only where a signal asks for it.
    """

    def __init__(self, path: Path | None = None, seconds: float | None = None) -> None:
        self.path, self.seconds = path, seconds
        self._written = time.monotonic()

    def due(self) -> bool:
        """Whether the next is to be written."""
        wanted = None if self.path is None else self.seconds
        return wanted is not None and time.monotonic() - self._written >= wanted

    def save(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Write it, whole or not at all; a full disk is said and the stage goes on."""
        if self.path is None:
            return
        try:
            write_tensors(self.path, tensors, about)
        except (OSError, UserError) as error:
            log.warning("no checkpoint, the stage goes on: %s", error)
        self._written = time.monotonic()

    def load(self) -> Saved | None:
        """What was written last; damage is said, and the stage begins again."""
        try:
            return None if self.path is None else read_tensors(self.path)
        except FileNotFoundError:
            return None
        except Damaged as error:
            log.warning("%s: the stage begins again", error)
            return None
