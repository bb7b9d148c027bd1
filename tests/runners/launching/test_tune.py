"""experiment=tune: a trial's value is its loss on calibration text, and no record is left."""

from __future__ import annotations

import math

import pytest
from omegaconf import OmegaConf

from runners.job import calibration_loss
from runners.point_config import PointConfig

WORDS = ("method=router_tuning", "sparsity=0.2", "budget.routers.steps=2")


def test_a_trials_value_follows_the_rate_and_leaves_no_record(tiny_config, tmp_path):
    found = []
    for lr in ("1.0e-3", "1.0"):
        config = tiny_config(*WORDS, f"method.training.lr={lr}")
        found.append(calibration_loss(OmegaConf.create(config)))
        folder = tmp_path / "results" / PointConfig.parse(config).fingerprint
        assert not (folder / "result.json").exists()
    assert all(0 < loss < 8 for loss in found) and found[0] != found[1]


def test_a_trial_that_fails_is_the_worst(tiny_config):
    config = tiny_config("method=mod", "sparsity=0.9")
    assert calibration_loss(OmegaConf.create(config)) == math.inf


def test_one_value_of_each_rate_is_tried(commands):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    done = commands.run(
        "sweep", "experiment=tune", "model=tiny", *WORDS, "hydra.sweeper.n_trials=2",
        "hydra.sweeper.params={method.training.lr:'choice(1.0e-3,1.0e-2)'}", "-m",
    )  # fmt: skip
    assert done.code == 0, done
    assert "Best parameters" in str(done)
