"""Small random models and the real method configs, shrunk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from transformers import PreTrainedModel

from methods.base import Method
from methods.engine.families import FAMILIES
from runners.assets import tiny_model
from runners.build import build_budget, build_method
from runners.loop import Loop
from runners.probe import ModelProbe, ProbeText

CONF = Path(__file__).resolve().parents[2] / "conf"
METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
SMALL = {"rank": 4, "router_width": 8}
TINY_BUDGET = [
    "budget.seq_len=32",
    "budget.fit_tokens=512",
    "budget.calibration_tokens=512",
    "budget.sensitivity_tokens=64",
    "budget.forecasters={steps:3,batch_size:2,seq_len:16,accumulate:1}",
    "budget.routers={steps:3,batch_size:2,seq_len:32,accumulate:1}",
]


def compose_config(*overrides: str) -> dict[str, Any]:
    """A real config on the tiny model, with a tiny budget."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        words = ["model=tiny", "tracking=off", "dtype=float32", *TINY_BUDGET, *overrides]
        cfg = compose("sweep", overrides=words)
    config = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(config, dict)
    for key in SMALL.keys() & config["method"].keys():
        config["method"][key] = SMALL[key]
    return config


@pytest.fixture(params=METHODS)
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    return compose_config(f"method={request.param}", "sparsity=0.4")


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny("llama")


def tiny(family: str) -> PreTrainedModel:
    """Frozen random model with outputs large enough to see."""
    model, _ = tiny_model(family=family, seed=3)
    return model.eval().requires_grad_(False)


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    """Token ids of the byte vocabulary, special tokens left out."""
    return torch.randint(3, 250, shape, generator=torch.Generator().manual_seed(seed))


def probe_for(model: PreTrainedModel, method: Method) -> ModelProbe:
    """Random rows for every question."""
    text = ProbeText(random_ids(16, 32), random_ids(32, 32, seed=1), random_ids(2, 32, seed=2))
    return ModelProbe(model, method, text)


@pytest.fixture
def trained() -> Callable[[dict[str, Any], PreTrainedModel], Method]:
    """Run a method's whole recipe on random text, calibration included."""

    def run(config: dict[str, Any], model: PreTrainedModel) -> Method:
        method = build_method(config, model)
        budget = build_budget(config)
        probe = probe_for(model, method)
        rows = lambda stage: random_ids(8, stage.seq_len, seed=4)  # noqa: E731
        loop = Loop(model, method, probe, rows, objective=config["objective"], seed=0)
        method.fit(probe)
        for stage in method.stages(budget):
            loop.run(stage)
        method.calibrate(probe, method.sparsity)
        return method

    return run
