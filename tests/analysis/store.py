"""Writes a results store by hand, as the runners would."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


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
    folder: Path, method: str, sparsity: float, *, perplexity: float, **changes: Any
) -> None:
    """One record; `changes` replace its top-level keys."""
    seed = changes.get("seed", 0)
    name = f"{method}-{sparsity}-{seed}-{changes.get('variant', '')}"
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
                "dense": 20.0,
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
        "identity": {"fingerprint": name, "budget": "quick"},
        **changes,
    }
    (folder / name).mkdir(parents=True)
    (folder / name / "result.json").write_text(json.dumps(record))
