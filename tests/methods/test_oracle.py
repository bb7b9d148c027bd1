"""The oracle decides by the true error, and is marked as a bound wherever it is reported."""

from __future__ import annotations

import json

import pytest
import torch

from analysis.frames import Store
from methods.engine.routed import attach, routed
from methods.oracle import Oracle
from tests.analysis.store import write_point
from tests.methods.by_hand import evaluate
from tests.methods.conftest import small_ids, small_model


@pytest.fixture
def model():
    return small_model(layers=3)


@pytest.mark.parametrize("bypass", ["skip", "forecast"])
def test_scores_are_the_error_on_the_routed_stream(model, bypass):
    method = attach(model, Oracle(sparsity=0.5, bypass=bypass, rank=3)).eval()
    method.log_sensitivity.copy_(torch.linspace(-1, 1, 6))
    ids = small_ids(2, 8)
    _, decisions = evaluate(model, method, ids)
    method.threshold.fill_(float(torch.stack([d.scores_BT for d in decisions.values()]).median()))
    outputs, inputs = {}, {}
    for i, layer in enumerate(model.model.layers):
        for kind, norm, unit in (
            ("attention", layer.input_layernorm, layer.self_attn),
            ("mlp", layer.post_attention_layernorm, layer.mlp),
        ):
            norm.register_forward_hook(lambda _, __, x, key=(i, kind): inputs.__setitem__(key, x))
            unit.register_forward_hook(
                lambda _, __, y, key=(i, kind): outputs.__setitem__(
                    key, y[0] if isinstance(y, tuple) else y
                )
            )
    _, decisions = evaluate(model, method, ids)
    assert len(decisions) == 6
    for place, (site, decision) in enumerate(decisions.items()):
        error = outputs[site.layer, site.kind]
        if bypass == "forecast":
            forecaster = method.forecasters.modules_by_site[site.key]
            error = error - forecaster(inputs[site.layer, site.kind])
        wanted = error.norm(dim=-1).log() + torch.linspace(-1, 1, 6)[place]
        assert torch.allclose(decision.scores_BT, wanted, atol=1e-3)


@pytest.mark.parametrize("mode", ["masked", "gathered"])
def test_looking_runs_each_unit_once(model, mode):
    """A second run would write a token's keys twice."""
    method = attach(model, Oracle(sparsity=0.5, bypass="skip")).eval()
    method.threshold.fill_(0.0)
    runs = []
    model.model.layers[1].mlp.down_proj.register_forward_hook(lambda *_: runs.append(1))
    with torch.no_grad(), routed(model, method, mode):
        cache = model(input_ids=small_ids(2, 8), use_cache=True).past_key_values
    assert len(runs) == 1
    assert all(layer.get_seq_length() == 8 for layer in cache.layers)


def test_every_table_and_picture_says_how_it_decides(tmp_path):
    """It is beaten by trained methods, so that "upper bound" would be wrong."""
    identity = {"fingerprint": "x", "budget": "quick", "upper_bound": True}
    write_point(tmp_path, "oracle", 0.3, perplexity=21.0, identity=identity)
    write_point(tmp_path, "informed", 0.3, perplexity=30.0)
    store = Store(tmp_path)
    assert set(store.points["line"]) == {"oracle (true error)", "informed"}
    assert set(store.measures["line"]) == set(store.averaged["line"]) == set(store.points["line"])


@pytest.mark.slow
def test_the_record_says_so(commands):
    done = commands.run("sweep", "method=oracle", "method.rank=4", "sparsity=0.3")
    assert done.code == 0, done.stderr
    (path,) = commands.results.glob("*/result.json")
    record = json.loads(path.read_text())
    assert record["identity"]["upper_bound"] is True


def test_a_target_out_of_reach_fails_before_training_with_one_line(commands):
    done = commands.run("sweep", "method=mod", "sparsity=0.7")
    assert done.code != 0
    assert "out of reach: it routes 0.500 of all units" in done.stdout
    assert "stage" not in done.stdout
