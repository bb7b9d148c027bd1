"""A gradient stage in progress: all that its next step depends on, to keep and to go back to."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from methods.base import Method
from runners.errors import UserError
from runners.runtime.memory import free_memory
from runners.training.batches import Batches
from runners.training.checkpoints import Saved
from runners.training.rng import RandomState

log = logging.getLogger(__name__)

METHOD, OPTIMISER, ORDER = "method.", "optimiser.", "data.order"


@dataclass
class Position:
    """How far the stage is."""

    thresholds: dict[float, float]
    """By target; what the controller moves."""
    micro_batch: int
    """Rows of a pass."""
    step: int = 0
    """Finished steps."""
    loss: float | None = None
    """Of the last step."""
    oom_halvings: int = 0
    """How often memory did not suffice for the micro-batch."""


@dataclass(frozen=True)
class Mark:
    """Where a step began: what moves before its parameters do."""

    order: Tensor
    random: RandomState


class Training:
    """The parts of a stage that change from step to step.

    Args:
        method: its buffers and `parameters` are all that changes of the model.
        parameters: those that train.
        adamw, schedule: of `optimise.optimiser`.
        batches: where the data comes from.
        at: the start.
    """

    def __init__(
        self,
        method: Method,
        parameters: Sequence[nn.Parameter],
        adamw: torch.optim.AdamW,
        schedule: Any,
        batches: Batches,
        at: Position,
    ) -> None:
        self.method, self.parameters = method, parameters
        self.adamw, self.schedule, self.batches, self.at = adamw, schedule, batches, at
        self.begin_step()

    def begin_step(self) -> None:
        """Remember where the data and the generators are."""
        self.mark = Mark(self.batches.order, RandomState.take(self.batches.device))

    def rewind(self) -> None:
        """Back to where the step began; its gradients are dropped."""
        self.adamw.zero_grad(set_to_none=True)
        self.batches.order = self.mark.order
        self.mark.random.put(self.batches.device)

    def halve(self, stage: str) -> None:
        """Half the rows a pass, after an allocation failed; the step is begun again.

        Raises:
            UserError: a single row is too much.
        """
        self.rewind()
        free_memory()
        at, rows = self.at, self.batches.rows
        if at.micro_batch == 1:
            raise UserError(
                f"stage {stage}: out of memory with a micro-batch of one row of {rows.shape[1]} "
                "tokens; give the stage shorter rows (seq_len of its budget) or a larger device"
            )
        at.micro_batch = (at.micro_batch + 1) // 2
        at.oom_halvings += 1
        log.warning("stage %s: out of memory; micro-batch now %d rows", stage, at.micro_batch)

    def tensors(self) -> dict[str, Tensor]:
        """All that changes and is a tensor, as it was when the step began."""
        trained = {id(parameter) for parameter in self.parameters}
        found = {METHOD + k: v for k, v in self.method.named_buffers()}
        found |= {METHOD + k: v for k, v in self.method.named_parameters() if id(v) in trained}
        for index, state in self.adamw.state_dict()["state"].items():
            found |= {f"{OPTIMISER}{index}.{key}": value for key, value in state.items()}
        return {**found, ORDER: self.mark.order, **self.mark.random.tensors}

    def state(self) -> dict[str, Any]:
        """The rest, as JSON values."""
        groups = self.adamw.state_dict()["param_groups"]
        return {
            "position": {**asdict(self.at), "thresholds": list(self.at.thresholds.items())},
            "optimiser": groups,
            "schedule": self.schedule.state_dict(),
            "random": self.mark.random.to_dict(),
        }

    def restore(self, saved: Saved) -> None:
        """Go on from a checkpoint of the same stage."""
        tensors, state = saved.tensors, saved.state
        own = {**dict(self.method.named_buffers()), **dict(self.method.named_parameters())}
        with torch.no_grad():
            for name, value in tensors.items():
                if name.startswith(METHOD):
                    own[name.removeprefix(METHOD)].copy_(value)
        self.adamw.load_state_dict(_optimiser_state(tensors, state["optimiser"]))
        self.schedule.load_state_dict(state["schedule"])
        position = dict(state["position"])
        thresholds = dict(position.pop("thresholds"))
        self.at = Position(thresholds, **position)
        self.batches.order = tensors[ORDER]
        RandomState.from_parts(tensors, state["random"]).put(self.batches.device)
        self.begin_step()


def _optimiser_state(
    tensors: Mapping[str, Tensor], groups: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """As `Optimizer.state_dict` gives it."""
    by_index: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith(OPTIMISER):
            index, _, key = name.removeprefix(OPTIMISER).partition(".")
            by_index.setdefault(int(index), {})[key] = value
    lists = [{**group, "betas": tuple(group["betas"])} for group in groups]
    return {"state": by_index, "param_groups": lists}
