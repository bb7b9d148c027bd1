"""The command that started a point, as a user would type it for this point alone."""

from __future__ import annotations

import shlex

from hydra.core.hydra_config import HydraConfig

from runners.store.redact import REDACTED, is_secret, redact_text


def started_with() -> str | None:
    """`python runners/sweep.py method=informed sparsity=0.5`; None outside a Hydra run.

    One point of a sweep gives its own overrides. An experiment that is a sweep by itself would
    start all its points again, so `hydra.mode=RUN` is added.
    """
    if not HydraConfig.initialized():
        return None
    hydra = HydraConfig.get()
    words = [_clean(word) for word in hydra.overrides.task]
    if any(word.startswith("experiment=") for word in words):
        words.append("hydra.mode=RUN")
    script = str(hydra.job.name).rpartition(".")[2]
    return shlex.join(["python", f"runners/{script}.py", *words])


def _clean(word: str) -> str:
    key, separator, _ = word.partition("=")
    name = key.lstrip("+~").rpartition(".")[2]
    return f"{key}={REDACTED}" if separator and is_secret(name) else redact_text(word)
