"""Channel sparsity against its definition, on a small model."""

from __future__ import annotations

import pytest
import torch

from methods.channel_sparse import ChannelSparse
from methods.engine.measure.flops import flops_ratio
from methods.engine.routed import attach, routed
from runners.corpus.rows import ProbeText
from runners.training.flops_target import calibrate_saving
from runners.training.probe import ModelProbe
from tests.methods.by_hand import ByHand
from tests.methods.conftest import small_ids, small_model

TEXT = ProbeText(*(small_ids(2, 8),) * 3)


def made(model, sparsity, **options):
    method = attach(model, ChannelSparse(sparsity=sparsity, **options)).eval()
    method.calibrate(ModelProbe(model, method, TEXT), sparsity)
    return method


def product(x_D, weight, share, policy):
    """The largest channels one after the other, all others left out."""
    worth = x_D.abs() * (weight.norm(dim=0) if policy == "wina" else 1.0)
    total = torch.zeros(len(weight))
    for channel in worth.argsort(descending=True)[: round(share * len(x_D))].tolist():
        total += x_D[channel] * weight[:, channel]
    return total


@pytest.mark.parametrize("mode", ["masked", "gathered"])
@pytest.mark.parametrize("policy", ["teal", "wina"])
def test_every_token_runs_mlps_on_its_largest_channels(policy, mode):
    """The first half of a prompt too, which the published code of TEAL leaves dense."""
    model = small_model()
    method, ids = made(model, 0.3, policy=policy), small_ids(2, 6)

    def mlp(layer, x_D):
        def times(values, projection):
            return product(values, projection.weight, float(method.share), policy)

        gate, up = times(x_D, layer.mlp.gate_proj), times(x_D, layer.mlp.up_proj)
        return times(gate * torch.sigmoid(gate) * up, layer.mlp.down_proj)

    def rule(index, layer, h, run):
        h = h + run.attention(layer, h)
        rows = layer.post_attention_layernorm(h).flatten(0, 1)
        return h + torch.stack([mlp(layer, row) for row in rows]).view_as(h)

    with torch.no_grad(), routed(model, method, mode):
        own = model(input_ids=ids).logits
    with torch.no_grad():
        assert torch.allclose(own, ByHand(model, rule)(ids), atol=1e-4)


@pytest.mark.parametrize("sparsity", [0.1, 0.25, 0.4])
def test_the_target_is_the_share_of_the_units_flops_that_is_saved(sparsity):
    """Counted from the model's own matrices; the head, and attention between tokens, stay."""
    model = small_model()
    method = made(model, sparsity)
    with torch.no_grad(), routed(model, method):
        model(input_ids=small_ids(1, 1))
        usage = model.routing.counters.read()
    units = 2.0 * sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2)
    head, scores = 2.0 * model.lm_head.weight.numel(), 2 * 4.0 * 4 * 12
    dense = units + head + scores
    saved = (1.0 - flops_ratio(method, usage)) * dense / units
    assert saved == pytest.approx(sparsity, abs=0.01)  # whole channels


def test_more_than_the_mlps_have_is_refused():
    with pytest.raises(ValueError, match=r"MLPs are 0\.\d+ of the units' FLOPs"):
        attach(small_model(), ChannelSparse(sparsity=0.9))


def test_a_saved_share_of_all_flops_is_found():
    """`target=flops` moves the share of channels; what was found is saved with the method."""
    model = small_model()
    method = attach(model, ChannelSparse(sparsity=0.1)).eval()
    text = ProbeText(*(small_ids(4, 16),) * 3)
    found = calibrate_saving(method, ModelProbe(model, method, text), 0.2, 16)
    assert found["flops_saved"] == pytest.approx(0.2, abs=0.015)  # whole channels
    again = attach(model, ChannelSparse(sparsity=0.1)).eval()
    again.load_state_dict(method.state_dict())
    site = method.sites()[0]
    assert again.cost(site) == method.cost(site)
    assert float(again.share) < 0.9
