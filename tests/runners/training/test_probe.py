"""What a fit is told about the model, against plain forward passes."""

from __future__ import annotations

import math

import pytest
import torch

from methods.base import Site
from methods.engine.decoder.families import shape_of
from tests.runners.toy import SITES, toy, toy_probe


@pytest.fixture
def probe(tiny_llama):
    return toy_probe(tiny_llama, toy(tiny_llama), batch_tokens=64)


def mean_loss(model, rows):
    """Of the untouched Hugging Face forward."""
    return float(model(input_ids=rows, labels=rows).loss)


@pytest.mark.parametrize("split", ["train", "calibration"])
def test_stream_shows_every_unit_and_token_once(probe, tiny_llama, split):
    inputs, outputs = {}, {}

    def keep(layer):
        def hook(_, args, out):
            inputs.setdefault(layer, []).append(args[0])
            outputs.setdefault(layer, []).append(out)

        return hook

    for layer, block in enumerate(tiny_llama.model.layers):
        block.mlp.register_forward_hook(keep(layer))
    views = []
    probe.stream(views.append, split)
    rows = getattr(probe.text, split)
    for site in shape_of(tiny_llama.config).units():
        own = [view for view in views if view.site == site]
        assert sum(len(view.x_ND) for view in own) == rows.numel()
        assert not any(view.y_ND.requires_grad for view in own)
        if site.kind == "mlp":
            x = torch.cat([part.flatten(0, 1) for part in inputs[site.layer]])
            y = torch.cat([part.flatten(0, 1) for part in outputs[site.layer]])
            assert torch.equal(torch.cat([view.x_ND for view in own]), x)
            assert torch.allclose(torch.cat([view.y_ND for view in own]), y, atol=1e-5)


def test_loss_of_nothing_bypassed_is_the_models(probe, tiny_llama):
    expected = mean_loss(tiny_llama, probe.text.calibration)
    assert probe.loss([]) == pytest.approx(expected, rel=1e-5)


def test_loss_of_a_bypassed_mlp_is_that_of_zero_weights(probe, tiny_llama):
    dense = probe.loss([])
    found = probe.loss([Site(1, "mlp")])
    tiny_llama.model.layers[1].mlp.down_proj.weight.data.zero_()
    expected = mean_loss(tiny_llama, probe.text.calibration)
    assert found == pytest.approx(expected, rel=1e-5)
    assert abs(found - dense) > 1e-3


def test_sensitivity_is_the_rms_gradient_at_the_output(tiny_llama):
    probe = toy_probe(tiny_llama, toy(tiny_llama))
    found = probe.sensitivity()
    rows = probe.text.sensitivity
    outputs = {}
    for layer, block in enumerate(tiny_llama.model.layers):
        block.mlp.register_forward_hook(
            lambda _, __, out, layer=layer: outputs.setdefault(layer, out).retain_grad()
        )
    embedded = tiny_llama.get_input_embeddings()(rows).requires_grad_(True)
    tiny_llama(inputs_embeds=embedded, labels=rows).loss.backward()
    for layer, output in outputs.items():
        rms = math.sqrt(float(output.grad.double().square().mean()))
        assert found[Site(layer, "mlp")] == pytest.approx(rms, rel=1e-3)
    assert len(found) == 2 * tiny_llama.config.num_hidden_layers
    assert all(parameter.grad is None for parameter in tiny_llama.parameters())


def test_routed_scores_count_what_a_threshold_bypasses(probe):
    method = probe.method
    method.threshold.fill_(0.123)
    seen = probe.routed_scores(0.0)
    pairs = len(SITES) * probe.text.calibration.numel()
    assert len(seen.scores) == pairs
    assert seen.total_weight == 8 * probe.text.calibration.numel()
    assert seen.sparsity == pytest.approx(float((seen.scores <= 0.0).sum()) / seen.total_weight)
    assert 0.0 < seen.sparsity < len(SITES) / 8
    assert float(method.threshold) == pytest.approx(0.123)


@pytest.mark.parametrize(("threshold", "sparsity"), [(-math.inf, 0.0), (math.inf, 2 / 8)])
def test_extreme_thresholds(probe, threshold, sparsity):
    assert probe.routed_scores(threshold).sparsity == pytest.approx(sparsity)


def test_threshold_and_model_are_put_back_after_an_exception(probe, tiny_llama, monkeypatch):
    before = float(probe.method.threshold)
    monkeypatch.setattr(probe, "_run_decoder", lambda rows, label: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        probe.routed_scores(0.5)
    assert float(probe.method.threshold) == before
    assert not hasattr(tiny_llama, "routing")


def test_tokens_read_are_counted(probe):
    probe.loss([])
    assert probe.tokens_read == probe.text.calibration.numel()
