"""All cases of a speed measurement, and what its record says about how they were taken."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from methods.base import Method
from methods.engine.decoder.placement import input_device, placed
from runners.base_model.load import Base
from runners.corpus.rows import encoder, load_rows
from runners.errors import UserError
from runners.point_config import PointConfig
from runners.store.provenance import provenance
from runners.timing.bench import Bench, RandomDraw

log = logging.getLogger(__name__)

ROUNDS = {"cuda": (10, 50), "cpu": (1, 5)}
"""(warm-up, timed) rounds where the config leaves them open."""


def measure(
    config: PointConfig, base: Base, method: Method, stages: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Time every case of the settings.

    Args:
        method: attached; trained and calibrated unless its decisions are drawn.
        stages: reports of its training, for the record.

    Returns:
        `{speed: {prefill, decode, settings}, record}`; `record` holds what a record without
        quality needs.

    Raises:
        UserError: too little text.
    """
    settings, model = config.resolved["speed"], base.model
    device = input_device(model)
    default = ROUNDS["cuda" if device.type == "cuda" else "cpu"]
    warmup = default[0] if settings["warmup"] is None else settings["warmup"]
    repeats = settings["repeats"] or default[1]
    bench = Bench(
        model,
        method,
        _rows(config, base, settings),
        draw=_draw(method, config.seed, device) if settings["decisions"] == "random" else None,
        warmup=warmup,
        repeats=repeats,
        kernels=settings["kernels"],
        graphs=_graphs(model, device) if settings["graphs"] == "auto" else settings["graphs"],
    )
    prefill = [
        _logged("prefill", bench.prefill(tokens, batch))
        for tokens in settings["prefill"]["tokens"]
        for batch in settings["prefill"]["batch_sizes"]
    ]
    decode = [
        _logged("decode", bench.decode(context, batch, settings["decode"]["steps"]))
        for context in settings["decode"]["context"]
        for batch in settings["decode"]["batch_sizes"]
    ]
    how = {
        "decisions": settings["decisions"],
        "trained": settings["trained"],
        "warmup": warmup,
        "repeats": repeats,
        "graphs": bench.graphs,
        "kernels": settings["kernels"],
        "compiled_loops": bench.compiled_loops,
        "attention": model.config._attn_implementation,
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        **{key: provenance()[key] for key in ("device", "git", "packages")},
    }
    return {
        "speed": {"prefill": prefill, "decode": decode, "settings": how},
        "record": _record(config, method, stages, prefill or decode),
    }


def _graphs(model: PreTrainedModel, device: torch.device) -> bool:
    """A graph replays on one device, over weights that are there."""
    return device.type == "cuda" and not placed(model)


def _record(
    config: PointConfig,
    method: Method,
    stages: Sequence[Mapping[str, Any]],
    cases: list[dict[str, Any]],
) -> dict[str, Any]:
    identity = {"fingerprint": config.fingerprint, "budget": config.budget.name, **provenance()}
    return {
        "sparsity_realised": cases[0]["sparsity"] if cases else None,
        "flops_ratio": 1.0 / cases[0]["bound"] if cases else None,
        "stages": stages,
        "added_parameters": sum(p.numel() for p in method.parameters()),
        "identity": identity,
    }


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


def _rows(config: PointConfig, base: Base, settings: Mapping[str, Any]) -> Tensor:
    """Test text as rows that every case fits in, int64 [batch, tokens]."""
    prefill, decode = settings["prefill"], settings["decode"]
    lengths = [*prefill["tokens"], *(c + decode["steps"] for c in decode["context"])]
    longest, most = max(lengths), max([*prefill["batch_sizes"], *decode["batch_sizes"]])
    rows = load_rows(
        config.data,
        "test",
        encoder(base.tokenizer),
        seq_len=longest,
        tokens=longest * most,
        seed=config.seed,
    )
    if len(rows) < most:
        raise UserError(
            f"the test text gives {len(rows)} rows of {longest} tokens, fewer than the {most} of "
            "the largest batch: give more text or smaller speed.prefill and speed.decode"
        )
    return rows
