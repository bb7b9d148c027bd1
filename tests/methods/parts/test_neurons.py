"""Forecasters that keep some of an MLP's own neurons: choice, values, and what they bring."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from methods.base import Site
from methods.engine.observe import observed
from methods.engine.routed import attach
from methods.informed_plus import InformedPlus
from runners.corpus.rows import ProbeText
from runners.errors import UserError
from runners.training.probe import ModelProbe
from tests.methods.conftest import PLAIN, small_ids, small_model
from tests.methods.engine.decoder.test_placement import LAYERS, PLACES

MLP = Site(1, "mlp")


def probe_for(model, method):
    train, calibration = small_ids(8, 40, seed=1), small_ids(4, 40, seed=2)
    return ModelProbe(model, method, ProbeText(train, calibration, sensitivity=train[:2]))


def solved(model, *, neurons, **options):
    method = attach(model, InformedPlus(sparsity=0.5, rank=4, neurons=neurons, **options))
    method.forecasters.solve(probe_for(model, method))
    return method


def seen_at(model, probe, site):
    """Input and output of one unit on the training text, and the module that made it."""
    views = []

    def visit(view):
        if view.site == site:
            views.append(view)

    with torch.no_grad(), observed(model, visit):
        model(input_ids=probe.text.train)
    (view,) = views
    return view.x_ND, view.y_ND, model.model.layers[site.layer].mlp


@pytest.mark.parametrize("family", ["gemma2", "granite", "mixtral", "olmo2", "phi3"])
def test_an_mlp_whose_neurons_do_not_add_up_is_refused(family):
    with pytest.raises(UserError, match=r"no neuron of it can be kept \(set method\.neurons=0"):
        solved(small_model(family), neurons=5)


@pytest.mark.parametrize("family", PLAIN)
def test_all_neurons_are_the_mlp(family):
    model = small_model(family)
    method = solved(model, neurons=1000)
    x, y, _ = seen_at(model, probe_for(model, method), MLP)
    assert method.forecasters.at(MLP).neurons.gate.out_features == 48
    assert torch.allclose(method.forecasters(MLP, x), y, atol=1e-4)
    assert method.forecasters.at(Site(1, "attention")).neurons is None


def test_those_are_kept_whose_contributions_vary_most():
    """Each neuron's contribution to the output, [tokens, D], computed one at a time."""
    model = small_model()
    method = solved(model, neurons=5)
    probe = probe_for(model, method).sample()
    x, _, mlp = seen_at(model, probe, MLP)
    spread = []
    for f in range(48):
        gate, up = x @ mlp.gate_proj.weight[f], x @ mlp.up_proj.weight[f]
        contribution = torch.outer(gate * torch.sigmoid(gate) * up, mlp.down_proj.weight[:, f])
        spread.append(float((contribution - contribution.mean(0)).square().sum()))
    best = sorted(range(48), key=lambda f: -spread[f])[:5]
    own = method.forecasters.at(MLP).neurons
    assert torch.equal(own.gate.weight, mlp.gate_proj.weight[sorted(best)])
    assert torch.equal(own.into.weight, mlp.up_proj.weight[sorted(best)])
    assert torch.equal(own.up.weight, mlp.down_proj.weight[:, sorted(best)])


@pytest.mark.parametrize("where", sorted(PLACES))
def test_they_are_found_where_the_weights_are_offloaded(where, tmp_path):
    here = solved(small_model(layers=LAYERS), neurons=5)
    away = solved(PLACES[where](small_model(layers=LAYERS), tmp_path), neurons=5)
    expected = here.forecasters.state_dict()
    assert expected["modules_by_site.1_mlp.neurons.up.weight"].abs().sum() > 0
    for name, found in away.forecasters.state_dict().items():
        assert torch.allclose(found, expected[name], atol=1e-4), name


def test_the_linear_map_forecasts_what_they_leave():
    """The two maps are least squares of output minus neurons: no other bias would do better."""
    model = small_model()
    method = solved(model, neurons=5, damping=0.0)
    x, y, _ = seen_at(model, probe_for(model, method), MLP)
    own = method.forecasters.at(MLP)
    gate = torch.nn.functional.silu(x @ own.neurons.gate.weight.T)
    kept = (gate * (x @ own.neurons.into.weight.T)) @ own.neurons.up.weight.T
    error = y - kept - own.up(own.down(x))
    assert torch.allclose(error, y - method.forecasters(MLP, x), atol=1e-5)
    assert error.mean(0).abs().max() < 1e-4 * y.abs().max()


def test_more_neurons_explain_more():
    model = small_model()
    found = []
    for neurons in (0, 8, 24, 48):
        method = solved(model, neurons=neurons, without=["allocation"])
        found.append(method.forecasters.explained_variance(probe_for(model, method)))
    mlp = [one["explained_variance_mlp"] for one in found]
    assert mlp == sorted(mlp) and mlp[0] < 0.9 and mlp[-1] == pytest.approx(1.0, abs=1e-6)
    attention = {one["explained_variance_attention"] for one in found}
    assert len(attention) == 1


def test_they_count_in_the_cost_and_are_trained():
    model = small_model()
    with_them, without = (solved(model, neurons=5, without=w) for w in ([], ["neurons"]))
    assert not any(".neurons." in name for name in without.state_dict())
    for site in with_them.sites():
        rank = with_them.forecasters.at(site).rank
        neurons = 6 * 32 * 5 if site.kind == "mlp" else 0
        assert with_them.cost(site).approximate == 4 * 32 * rank + neurons
    x, y, _ = seen_at(model, probe_for(model, with_them), MLP)
    (y - with_them.forecasters(MLP, x)).square().mean().backward()
    gradients = [p.grad for p in with_them.forecasters.at(MLP).neurons.parameters()]
    assert len(gradients) == 3 and all(g.abs().sum() > 0 for g in gradients)


@pytest.mark.parametrize("options", [{"hidden_act": "gelu"}, {"mlp_bias": True}])
def test_other_mlps_are_one_clear_line(options):
    config = AutoConfig.for_model(
        "llama",
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        **options,
    )
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    with pytest.raises(UserError, match=r"0_mlp: .*no neuron of it.*method\.neurons=0"):
        solved(model, neurons=5)
    assert solved(model, neurons=0).forecasters.at(MLP).neurons is None
