"""Writes a results store by hand, as the runners would."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import yaml


def stage(name: str, seconds: float, *, cached: bool = False, **figures: float) -> dict[str, Any]:
    """A stage of a record."""
    return {
        "name": name,
        "seconds": seconds,
        "tokens": 1000,
        "steps": 10,
        "peak_memory_bytes": 2 * 1024**3,
        "final_loss": None,
        "figures": figures,
        "cached": cached,
    }


def write_point(
    folder: Path,
    method: str,
    sparsity: float,
    *,
    perplexity: float,
    dense: float = 20.0,
    config: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """One record, and its configuration if there is one; `changes` replace its top-level keys."""
    seed = changes.get("seed", 0)
    name = f"{method}-{sparsity}-{seed}-{changes.get('variant', '')}"
    if config is not None:
        name += hashlib.sha256(repr(config).encode()).hexdigest()[:6]
    record = {
        "schema_version": 1,
        "status": "complete",
        "method": method,
        "variant": "",
        "model": "tiny",
        "data": "sotu",
        "seed": seed,
        "sparsity_target": sparsity,
        "sparsity_realised": sparsity + 0.01,
        "flops_ratio": 1.0 - 0.8 * sparsity,
        "perplexity": {
            "sotu": {
                "value": perplexity,
                "low": perplexity * 0.9,
                "high": perplexity * 1.1,
                "dense": dense,
                "documents": 22,
            }
        },
        "accuracy": {
            "choice_task": {
                "value": 0.8 - sparsity / 2,
                "stderr": 0.02,
                "dense": 0.85,
                "n": 200,
                "chance": 0.25,
            }
        },
        "stages": [],
        **changes,
        "identity": {"fingerprint": name, "budget": "quick", **changes.get("identity", {})},
    }
    (folder / name).mkdir(parents=True)
    (folder / name / "result.json").write_text(json.dumps(record))
    if config is not None:
        whole = {**config, "seed": seed, "sparsity": sparsity}
        (folder / name / "config.yaml").write_text(yaml.safe_dump(whole, sort_keys=False))
    return folder / name
