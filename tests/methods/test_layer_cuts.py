"""ReplaceMe and LinearPatch against Hugging Face models with the layers really cut out."""

from __future__ import annotations

import copy

import pytest
import torch

from methods.engine.measure.flops import flops_ratio
from methods.engine.routed import attach, routed
from methods.engine.routing import routing_of
from methods.linear_patch import LinearPatch, hadamard
from methods.parts.static_order import best_cuts
from methods.replace_me import ReplaceMe
from tests.methods.conftest import small_ids, small_model
from tests.methods.test_layer_skip import LAYERS, hidden_streams, probe_of, without

TRAIN = small_ids(4, 16, seed=1)
"""What `probe_of` fits on."""
WIDTH = 32


@pytest.fixture
def model():
    return small_model(layers=LAYERS)


def fitted(model, kind, sparsity=0.4, **options):
    method = attach(model, kind(sparsity=sparsity, **options)).eval()
    probe = probe_of(model, method)
    method.fit(probe)
    method.calibrate(probe, sparsity)
    return method


def cut_of(method):
    """First layer of the cut, and the one after it, from what is bypassed."""
    layers = sorted({site.layer for site, runs in method.fixed().items() if not runs})
    assert layers == list(range(layers[0], layers[-1] + 1))
    return layers[0], layers[-1] + 1


def mlp_outputs(model, layer):
    seen = []
    hook = model.model.layers[layer].mlp.register_forward_hook(lambda *a: seen.append(a[2]))
    streams = hidden_streams(model, TRAIN)
    hook.remove()
    return seen[0].flatten(0, 1).double(), [s.flatten(0, 1).double() for s in streams]


def test_the_cut_turns_every_token_least(model):
    streams = [s.flatten(0, 1).double() for s in hidden_streams(model, small_ids(6, 16, seed=2))]
    found = best_cuts(probe_of(model, attach(model, LinearPatch(sparsity=0.4))))
    for n in range(1, LAYERS):
        angles = {}
        for i in range(1, LAYERS - n + 1):
            cosine = torch.nn.functional.cosine_similarity(streams[i], streams[i + n], dim=-1)
            angles[i] = float(cosine.arccos().mean())
        assert found[n] == min(angles, key=angles.__getitem__)


@pytest.mark.parametrize("mode", ["masked", "gathered"])
@pytest.mark.parametrize("rows", [1, 3])
@torch.no_grad()
def test_replace_me_is_the_cut_model_with_its_map_folded_into_the_mlp(model, rows, mode):
    method = fitted(model, ReplaceMe)
    first, end = cut_of(method)
    mlp, streams = mlp_outputs(model, first - 1)
    wanted = streams[end] - (streams[first] - mlp)
    solution = torch.linalg.lstsq(mlp, wanted, driver="gelsd").solution.float()
    cut = without(model, set(range(first, end)))
    down = cut.model.layers[first - 1].mlp.down_proj
    down.weight.copy_(solution.T @ down.weight)
    ids = small_ids(rows, 12)
    expected = cut(input_ids=ids).logits
    with routed(model, method, mode):
        cache, parts = None, []
        for start, stop in ((0, 6), (6, 10), (10, 11), (11, 12)):
            out = model(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
        usage = routing_of(model).counters.read()
    assert torch.allclose(torch.cat(parts, 1), expected, atol=2e-3)
    assert usage.sparsity() == pytest.approx(0.4)


def test_replace_me_by_gradient_turns_the_stream_towards_what_was_cut(model):
    def cosine(method):
        first, end = cut_of(method)
        mlp, streams = mlp_outputs(model, first - 1)
        near = streams[first] + method.patch(mlp.float()).double()
        return float(torch.cosine_similarity(near, streams[end], dim=-1).mean().detach())

    untouched = cosine(fitted(model, ReplaceMe, fit="cosine", lr=1e-12))
    found = cosine(fitted(model, ReplaceMe, fit="cosine", lr=2e-2, epochs=500, batch_tokens=64))
    assert found > untouched + 0.05
    assert found > cosine(fitted(model, ReplaceMe))


@torch.no_grad()
def test_linear_patch_gives_each_rotated_channel_its_size_back(model):
    method = fitted(model, LinearPatch)
    first, end = cut_of(method)
    _, streams = mlp_outputs(model, first - 1)
    rotation = hadamard(WIDTH)
    patched = streams[first] + method.patch(streams[first].float()).double()
    sizes = [(stream @ rotation).abs().mean(0) for stream in (patched, streams[end])]
    assert torch.allclose(*sizes, rtol=1e-4)
    whole = torch.eye(WIDTH) + method.patch.weight
    rotated = rotation.T @ whole.double() @ rotation
    assert torch.allclose(rotated, torch.diag(rotated.diagonal()), atol=1e-5)
    cut = without(model, set(range(first, end)))
    ids = small_ids(2, 12)
    layer = cut.model.layers[first - 1]
    layer.register_forward_hook(lambda module, args, out: out @ whole)
    with routed(model, method):
        out = model(input_ids=ids).logits
    assert torch.allclose(out, cut(input_ids=ids).logits, atol=2e-4)


@pytest.mark.parametrize("kind", [ReplaceMe, LinearPatch])
def test_another_target_gets_a_map_of_its_own(model, kind):
    method = fitted(model, kind, sparsity=0.4)
    before = copy.deepcopy(method.patch.weight)
    method.calibrate(probe_of(model, method), 0.2)
    again = fitted(model, kind, sparsity=0.2)
    assert torch.equal(method.patch.weight, again.patch.weight)
    assert not torch.equal(method.patch.weight, before)


@torch.no_grad()
def test_a_cut_costs_one_matrix_and_nothing_of_its_layers(model):
    method, ids = fitted(model, LinearPatch), small_ids(2, 12)
    first, end = cut_of(method)
    with routed(model, method):
        model(input_ids=ids)
        usage = routing_of(model).counters.read()
    parts = model.model.layers[0]
    per_layer = 2 * sum(p.weight.numel() for p in parts.modules() if hasattr(p, "in_features"))
    scores = 4 * 4 * 12 * usage.context
    saved = (end - first) * (usage.tokens * per_layer + scores) - usage.tokens * 2 * WIDTH**2
    whole = LAYERS * (usage.tokens * per_layer + scores) + usage.tokens * 2 * WIDTH * 61
    assert flops_ratio(method, usage) == pytest.approx(1 - saved / whole)


@pytest.mark.parametrize("order", [1, 2, 4, 12, 20, 28, 36, 60, 64, 576, 896, 960])
def test_hadamard_matrices_are_orthogonal_signs(order):
    made = hadamard(order)
    assert torch.allclose(made @ made.T, torch.eye(order).double(), atol=1e-9)
    assert torch.allclose(made.abs(), torch.full_like(made, order**-0.5))


def test_an_order_without_a_hadamard_matrix_is_refused():
    with pytest.raises(ValueError, match="no Hadamard matrix of order 6 "):
        hadamard(6)
