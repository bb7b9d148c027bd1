"""What the tests of the trackers have in common."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from runners.point_config import TrackingConfig
from runners.store.redact import redact
from runners.tracking import open_tracker
from runners.tracking.base import Safe

KEY = "s3cret" * 6 + "abcd"
IDENTITY = {
    "method": "informed",
    "variant": "",
    "sparsity_target": 0.3,
    "seed": 2,
    "model": "tiny",
    "data": "sotu",
}


def tracking_config(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A config with an offline W&B run below a folder, and a secret; the environment names none."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    tracking = {"backend": "wandb", "mode": "offline", "project": "p", "entity": None}
    tracking |= {"tags": ["mine"], "init_timeout_s": 30, "finish_timeout_s": 30}
    tracking |= {"group": "a-sweep", "dir": str(folder / "wandb-folder")}
    return {"tracking": tracking, "sparsity": 0.3, "hf_token": "s3cret"}


def opened(
    config: dict[str, Any], folder: Path, job: str = "sweep"
) -> AbstractContextManager[Safe]:
    """The tracker of a config's point, as a run opens it."""
    tracking = TrackingConfig(**config["tracking"])
    return open_tracker(tracking, folder, job=job, identity=IDENTITY, config=redact(config))
