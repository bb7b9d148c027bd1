"""Time all cases of a speed measurement, and say of each how it was taken."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from methods.base import Method
from methods.engine.decoder.placement import input_device, placed
from methods.engine.lora import LoraFactors
from runners.base_model.load import Base
from runners.corpus.rows import encoder, load_rows
from runners.errors import UserError
from runners.point_config import DataConfig, Phase, PointConfig, SpeedConfig
from runners.runtime.memory import give_back
from runners.store.provenance import provenance
from runners.store.record import Record
from runners.timing.bench import Bench, RandomDraw
from runners.timing.neighbours import neighbours

log = logging.getLogger(__name__)

Cases = Iterable[tuple[Phase, dict[str, int]]]
ROUNDS = {"cuda": (10, 50), "cpu": (1, 5)}
"""(warm-up, timed) rounds where the config leaves them open."""


def measure(
    speed: SpeedConfig, cases: Cases, data: DataConfig, seed: int, base: Base, method: Method
) -> Iterator[tuple[Phase, dict[str, Any]]]:
    """Time cases, one after the other.

    Adapters are timed as they are used: added to the weights, where these are in one place.

    Args:
        cases: those of `speed`, or some of them.
        method: attached; trained and calibrated unless its decisions are drawn.

    Yields:
        `prefill` or `decode`, and a case's figures with how they were taken.

    Raises:
        UserError: too little text.
    """
    model, device = base.model, input_device(base.model)
    give_back()
    warmup, repeats = ROUNDS["cuda" if device.type == "cuda" else "cpu"]
    if isinstance(method.adapter, LoraFactors):
        method.adapter.merged = not placed(model)
    bench = Bench(
        model,
        method,
        _rows(speed, data, seed, base),
        draw=_draw(method, seed, device) if speed.decisions == "random" else None,
        warmup=warmup if speed.warmup is None else speed.warmup,
        repeats=speed.repeats or repeats,
        kernels=speed.kernels,
        # a graph replays on one device, over weights that are there
        graphs=device.type == "cuda" and not placed(model)
        if speed.graphs == "auto"
        else speed.graphs,
    )
    how = {
        "decisions": speed.decisions,
        "trained": speed.trained,
        "warmup": bench.warmup,
        "repeats": bench.repeats,
        "neighbours": speed.neighbours,
        "graphs": bench.graphs,
        "kernels": speed.kernels,
        "compiled_loops": bench.compiled_loops,
        "attention": model.config._attn_implementation,
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        **{key: provenance()[key] for key in ("device", "git", "packages")},
    }
    for phase, size in cases:
        with neighbours(speed.neighbours):
            if phase == "prefill":
                case = bench.prefill(size["seq"], size["batch"])
            else:
                case = bench.decode(size["context"], size["batch"], size["steps"])
        yield phase, _logged(phase, case) | how


def unevaluated(
    config: PointConfig,
    base: Base,
    method: Method,
    stages: Sequence[Mapping[str, Any]],
    case: dict[str, Any],
) -> Record:
    """The record without quality of a point that is timed before it is evaluated."""
    identity = {
        "fingerprint": config.fingerprint,
        "weights_sha256": base.weights_hash,
        "dtype": str(base.model.dtype).removeprefix("torch."),
        "objective": config.objective,
        "budget": config.budget.name,
        "upper_bound": method.upper_bound,
        "static": method.static(),
        "flops_only": method.flops_only,
        **provenance(),
    }
    return Record(
        **config.identity,
        evaluated=False,
        perplexity={},
        accuracy={},
        sparsity_realised=case["sparsity"],
        flops_ratio=1.0 / case["bound"],
        stages=stages,
        added_parameters=sum(p.numel() for p in method.parameters()),
        identity=identity,
    )


def _logged(kind: str, entry: dict[str, Any]) -> dict[str, Any]:
    size = entry.get("seq", entry.get("context"))
    log.info(
        "%s %d x %d: %.1f -> %.1f tokens/s, speed-up %.3f of %.3f (efficiency %.3f) at %.3f",
        kind,
        entry["batch"],
        size,
        entry["dense_tps"],
        entry["routed_tps"],
        entry["speedup"],
        entry["bound"],
        entry["efficiency"],
        entry["sparsity"],
    )
    return entry


def _draw(method: Method, seed: int, device: torch.device) -> RandomDraw:
    """Draws at the point's target, which its method was found to reach when it was built."""
    reach = method.reach()
    return RandomDraw(min(method.sparsity, reach), reach, seed, device)


def _rows(speed: SpeedConfig, data: DataConfig, seed: int, base: Base) -> Tensor:
    """Test text as rows that every case fits in, int64 [batch, tokens]."""
    prefill, decode = speed.prefill, speed.decode
    longest = max(*prefill.tokens, *(tokens + decode.steps for tokens in decode.context))
    most = max(*prefill.batch_sizes, *decode.batch_sizes)
    rows = load_rows(
        data, "test", encoder(base.tokenizer), seq_len=longest, tokens=longest * most, seed=seed
    )
    if len(rows) < most:
        raise UserError(
            f"the test text gives {len(rows)} rows of {longest} tokens, fewer than the {most} of "
            "the largest batch: give more text or smaller speed.prefill and speed.decode"
        )
    return rows
