"""Where training begins: a stage that trains for a target starts at it, whichever method's."""

from __future__ import annotations

import pytest

from runners.base_model.load import build_budget
from runners.point import build_method
from runners.point_config import PointConfig
from runners.training.loop import START_SHARE, Loop
from tests.conftest import token_rows
from tests.methods.conftest import method_config, probe_for


def begins(model, *words):
    """(stage, threshold, realised sparsity) at the start of each gradient stage."""
    name, *overrides = words
    config = method_config(name, "sparsity=0.4", *overrides)
    method = build_method(PointConfig.parse(config), model)
    probe, found = probe_for(model, method), []

    def on_start(stage, steps, curve):
        threshold = float(method.threshold)
        part = probe.sample(START_SHARE)
        found.append((stage, threshold, part.routed_scores(threshold).sparsity))

    rows = lambda budget: token_rows(8, budget.seq_len, seed=4)  # noqa: E731
    loop = Loop(model, method, probe, rows, objective="lm", seed=0, on_start=on_start)
    method.fit(probe)
    for stage in method.stages(build_budget(PointConfig.parse(config).budget)):
        loop.run(stage)
    return found


@pytest.mark.parametrize(
    "words",
    [
        ("d_llm",),
        ("hero",),
        ("skipgpt",),
        ("flexidepth", "method.training.hold=0.5"),
        ("informed", "method.train=routers", "method.router.start=none", "method.targets=[]"),
    ],
    ids=" ".join,
)
def test_training_begins_at_its_target(tiny_llama, words):
    """Also from random routers, and in the stage of adapters that follows."""
    found = begins(tiny_llama, *words)
    assert found
    for stage, _, realised in found:
        assert realised == pytest.approx(0.4, abs=0.02), stage


@pytest.mark.parametrize(
    "name", ["mod_published", "router_tuning_published", "flexidepth_published"]
)
def test_where_the_threshold_decides_nothing_it_begins_at_zero(tiny_llama, name):
    """Expert choice, routers that cannot tell tokens apart, and a training for no target."""
    assert [threshold for _, threshold, _ in begins(tiny_llama, name)] == [0.0]
