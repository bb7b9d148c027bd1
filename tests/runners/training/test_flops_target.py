"""Targets in FLOPs, and recipes that read as many tokens as asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from methods.engine.measure.flops import flops_ratio
from methods.engine.routed import attach, routed
from methods.layer_skip import LayerSkip
from methods.random import Random
from methods.router_tuning import RouterTuning
from methods.static_forecast import StaticForecast
from methods.types import RoutedScores
from runners.errors import UserError
from runners.job import run_point
from runners.point import build
from runners.point_config import PointConfig
from runners.training.flops_target import calibrate_saving, estimated_saving, retarget
from tests.conftest import token_rows


def result(config: dict) -> dict:
    run_point(OmegaConf.create(config))
    (folder,) = Path(config["results_dir"]).iterdir()
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize(
    ("method", "share"),
    [
        ("informed", 0.08),
        ("greedy", 0.08),
        ("random", 0.2),
        ("d_llm", 0.02),
    ],
)
def test_calibration_saves_the_share_that_was_asked(tiny_config, method, share):
    words = (f"method={method}", "target=flops", f"sparsity={share}")
    words += ("budget.calibration_tokens=2048",)
    record = result(tiny_config(*words))
    assert record["status"] == "complete", record["reason"]
    found = record["stages"][-1]["figures"]
    assert found["flops_saved"] == pytest.approx(share, abs=0.005)
    assert record["sparsity_target"] == share and record["variant"].endswith("target=flops")
    # what is saved and read again is the sparsity that the search found
    assert record["options"]["sparsity"] == found["sparsity"]
    assert record["realised"]["achievable"] == pytest.approx(found["sparsity"])


def test_a_method_without_a_sparsity_of_units_finds_its_channels(tiny_config):
    record = result(tiny_config("method=channel_sparse", "target=flops", "sparsity=0.1"))
    assert 1.0 - record["flops_ratio"] == pytest.approx(0.1, abs=0.01)


def test_a_method_in_steps_takes_the_nearest(tiny_config):
    words = ("method=layer_skip", "method.policy=uniform", "target=flops", "sparsity=0.2")
    record = result(tiny_config(*words))
    one_block = 1.0 - record["flops_ratio"]
    assert record["sparsity_realised"] == 0.25 and one_block == pytest.approx(0.2, abs=0.06)


def test_the_estimate_is_what_is_counted(tiny_llama):
    """Random decisions bypass every unit alike, as the estimate takes for granted."""
    method = attach(tiny_llama, Random(sparsity=0.4)).eval()
    method.threshold.fill_(0.4)  # its scores are uniform
    rows = token_rows(2, 512)
    with routed(tiny_llama, method, "gathered") as model:
        model(rows)
        usage = model.routing.counters.read()
    counted = 1.0 - flops_ratio(method, usage)
    assert estimated_saving(method, usage.sparsity(), 512) == pytest.approx(counted, abs=0.01)


def test_static_units_save_their_keys_and_values_too(tiny_llama):
    routed_units = attach(tiny_llama, Random(sparsity=0.5))
    static = attach(tiny_llama, StaticForecast(sparsity=0.5, rank=1))
    assert estimated_saving(static, 0.5, 64) > estimated_saving(routed_units, 0.5, 64) + 0.02


def test_a_search_at_the_end_of_what_is_allowed_ends(tiny_llama):
    method = attach(tiny_llama, LayerSkip(sparsity=0.999, policy="uniform"))

    class Probe:
        def routed_scores(self, threshold: float) -> RoutedScores:
            return RoutedScores(0.75, torch.zeros(0), torch.zeros(0), 1.0, flops_ratio=0.6)

    found = calibrate_saving(method, Probe(), 0.5, 64)
    assert found == {"sparsity": 0.999, "realised": 0.75, "flops_saved": pytest.approx(0.4)}


def test_a_method_whose_sites_follow_from_its_sparsity_keeps_them(tiny_llama):
    """Routers were made, and trained, for the sites of the first estimate."""
    method = attach(tiny_llama, RouterTuning(sparsity=0.3))
    sites = method.sites()
    retarget(method, 0.45)
    assert method.sparsity == 0.3 and method.sites() == sites and len(sites) == 3
    retarget(method, 0.29)
    assert method.sparsity == 0.29 and method.sites() == sites


def test_more_than_can_be_saved_is_one_line_before_training(tiny_config):
    config = PointConfig.parse(tiny_config("method=d_llm", "target=flops", "sparsity=0.9"))
    with pytest.raises(UserError, match=r"out of reach: with every routed unit bypassed .* saves"):
        build(config)


def test_the_usual_target_leaves_a_fingerprint_alone(tiny_config):
    plain = PointConfig.parse(tiny_config("sparsity=0.3"))
    config = tiny_config("sparsity=0.3", "target=sparsity")
    assert PointConfig.parse(config).fingerprint == plain.fingerprint
    flops = PointConfig.parse(tiny_config("sparsity=0.3", "target=flops"))
    assert flops.fingerprint != plain.fingerprint and "flops saved=0.3" in flops.label


@pytest.mark.parametrize("method", ["d_llm", "skipgpt", "informed"])
def test_gradient_stages_read_what_the_budget_has_left(tiny_config, method):
    """Up to a step; a recipe that reads more by itself keeps its steps."""
    wanted = 4096
    usual = result(tiny_config(f"method={method}", "sparsity=0.25", "results_dir=${cache_dir}/a"))
    config = tiny_config(f"method={method}", "sparsity=0.25", f"budget.tokens={wanted}")
    stages = result(config)["stages"][:-1]
    read = sum(stage["tokens"] for stage in stages)
    before = sum(stage["tokens"] for stage in usual["stages"][:-1])
    step = max(stage["tokens"] // max(stage["steps"], 1) for stage in stages if stage["steps"])
    assert before < wanted and wanted - len(stages) * step < read <= wanted


def test_what_trains_nothing_reads_no_more(tiny_config):
    record = result(tiny_config("method=layer_skip", "sparsity=0.25", "budget.tokens=100000"))
    assert sum(stage["tokens"] for stage in record["stages"]) < 100000
