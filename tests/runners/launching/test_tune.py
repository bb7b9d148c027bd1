"""experiment=tune: a trial's value is its loss on calibration text, and no record is left."""

from __future__ import annotations

import math
from importlib.util import find_spec

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


SEARCH = ("sweep", "experiment=tune", "model=tiny", *WORDS, "hydra.sweeper.n_trials=2", "-m")


@pytest.mark.parametrize(
    "words",
    [
        ["method.training.lr=1.0e-3,1.0e-2"],
        ["method.training.lr=tag(log, interval(1e-4, 1e-2))", "hydra/sweeper/sampler=tpe"],
    ],
)
def test_what_the_command_gives_several_values_is_searched(commands, words):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    done = commands.run(*SEARCH, *words)
    assert done.code == 0, done
    assert "Best parameters: {'method.training.lr':" in str(done)


def test_a_search_of_nothing_is_refused(commands):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    done = commands.run(*SEARCH)
    assert done.code == 2, done
    assert "error: tune=true searches the options" in str(done)


@pytest.mark.skipif(
    find_spec("hydra_plugins.hydra_optuna_sweeper") is not None, reason="it is there"
)
def test_a_search_without_the_sweeper_says_what_to_install(commands):
    done = commands.run(*SEARCH, "method.training.lr=1.0e-3,1.0e-2")
    assert done.code == 2, done
    assert "error: a search needs Hydra's Optuna sweeper: pip install" in str(done)
