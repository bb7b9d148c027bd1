"""Static depth against rankings written out from each paper, and the untouched model."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from methods.base import Budget, Site, StageBudget
from methods.engine.routed import attach, routed
from methods.layer_skip import LayerSkip, uniform_order
from runners.corpus.rows import ProbeText
from runners.training.loop import Loop
from runners.training.probe import ModelProbe
from tests.methods.conftest import small_ids, small_model

LAYERS = 5


@pytest.fixture
def model():
    return small_model(layers=LAYERS)


def fitted(model, sparsity=0.4, **options):
    method = attach(model, LayerSkip(sparsity=sparsity, **options)).eval()
    probe = probe_of(model, method)
    method.fit(probe)
    method.calibrate(probe, sparsity)
    return method


def probe_of(model, method):
    text = ProbeText(
        train=small_ids(4, 16, seed=1),
        calibration=small_ids(6, 16, seed=2),
        sensitivity=small_ids(1, 16, seed=3),
    )
    return ModelProbe(model, method, text)


def without(model, layers):
    """The untouched Hugging Face model with these layers cut out."""
    cut = copy.deepcopy(model)
    cut.model.layers = torch.nn.ModuleList(
        layer for i, layer in enumerate(cut.model.layers) if i not in layers
    )
    for i, layer in enumerate(cut.model.layers):
        layer.self_attn.layer_idx = i
    cut.config.num_hidden_layers = len(cut.model.layers)
    return cut


def hidden_streams(model, ids):
    """Residual stream before each layer and after the last, before the final norm."""
    seen = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        for layer in model.model.layers
    ]
    hooks.append(model.model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0])))
    with torch.no_grad():
        model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return seen


def mean_cosine(a, b):
    a, b = a.flatten(0, 1).double(), b.flatten(0, 1).double()
    return float(((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean())


def dropped_layers(method):
    return {site.layer for site, runs in method.fixed().items() if not runs}


@pytest.mark.parametrize("layers", [{1, 3}, {0, 2}, {3, 4}])
def test_a_dropped_layer_is_as_if_cut_out_of_the_model(model, layers):
    method = attach(model, LayerSkip(sparsity=0.4)).eval()
    method.order.copy_(torch.tensor([*layers, *(set(range(LAYERS)) - layers)]))
    method.threshold.fill_(1.5)
    cut, ids = without(model, layers), small_ids(2, 8)
    with torch.no_grad(), routed(model, method):
        out = model(input_ids=ids)
        cached = model(input_ids=ids[:, :5], use_cache=True)
        assert torch.allclose(out.logits, cut(input_ids=ids).logits, atol=1e-5)
        texts = [
            m.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0) for m in (model, cut)
        ]
        usage = model.routing.counters.read()
    assert torch.equal(*texts)
    assert usage.sparsity() == pytest.approx(0.4)
    lengths = [layer.get_seq_length() for layer in cached.past_key_values.layers]
    kept = [0 if i in layers and i != 0 else 5 for i in range(LAYERS)]
    assert lengths == kept


def test_block_influence_is_one_minus_the_cosine_across_each_layer(model):
    method = fitted(model, policy="block_influence")
    streams = hidden_streams(model, small_ids(6, 16, seed=2))
    cosines = [mean_cosine(a, b) for a, b in itertools.pairwise(streams)]
    assert method.order.tolist() == sorted(range(LAYERS), key=lambda i: -cosines[i])


def test_attention_goes_first_by_its_own_cosine_then_the_mlps(model):
    method = fitted(model, policy="attention_first")
    cosines = {}

    def watch(module, site):
        norm = model.model.layers[site.layer]
        norm = norm.input_layernorm if site.kind == "attention" else norm.post_attention_layernorm
        before = []

        def after(_, __, output):
            y = output[0] if isinstance(output, tuple) else output
            cosines[site] = mean_cosine(before[-1], before[-1] + y)

        return [
            norm.register_forward_pre_hook(lambda _, args: before.append(args[0])),
            module.register_forward_hook(after),
        ]

    hooks = []
    for i, layer in enumerate(model.model.layers):
        hooks += watch(layer.self_attn, Site(i, "attention")) + watch(layer.mlp, Site(i, "mlp"))
    with torch.no_grad():
        model(input_ids=small_ids(6, 16, seed=2))
    for hook in hooks:
        hook.remove()
    order = [method.sites()[i] for i in method.order.tolist()]
    assert order[:LAYERS] == sorted(order[:LAYERS], key=lambda site: -cosines[site])
    assert order[LAYERS:] == sorted(order[LAYERS:], key=lambda site: -cosines[site])
    assert {site.kind for site in order[:LAYERS]} == {"attention"}


def test_greedy_drops_the_block_whose_loss_hurts_least_each_round(model):
    method = fitted(model, policy="greedy_ppl", tokens=64)
    ids, chosen = small_ids(4, 16, seed=1), []
    left = [1, 2, 3]
    while left:
        losses = {}
        for layer in left:
            with torch.no_grad():
                logits = without(model, {*chosen, layer})(input_ids=ids).logits[:, :-1]
            losses[layer] = float(
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            )
        best = min(losses, key=losses.__getitem__)
        chosen.append(best)
        left.remove(best)
    assert method.order.tolist() == [*chosen, 4, 0]


@pytest.mark.parametrize("dropped", [1, 2, 3])
def test_contiguous_drops_the_block_that_turns_the_stream_least(model, dropped):
    method = fitted(model, policy="contiguous", sparsity=dropped / LAYERS)
    streams = [s.flatten(0, 1).double() for s in hidden_streams(model, small_ids(6, 16, seed=2))]
    angles = {}
    for first in range(1, LAYERS - dropped + 1):
        pair = streams[first], streams[first + dropped]
        angles[first] = float(torch.cosine_similarity(*pair, dim=-1).arccos().mean())
    first = min(angles, key=angles.__getitem__)
    assert dropped_layers(method) == set(range(first, first + dropped))


def test_early_exit_keeps_a_prefix_and_random_follows_its_seed(model):
    assert dropped_layers(fitted(model, policy="early_exit")) == {3, 4}
    draws = {tuple(fitted(model, policy="random", seed=s).order.tolist()) for s in range(6)}
    assert len(draws) > 2
    again = fitted(model, policy="random", seed=1), fitted(model, policy="random", seed=1)
    assert torch.equal(again[0].order, again[1].order)


@pytest.mark.parametrize(
    "sites, dropped, first", [(6, 2, {1, 4}), (6, 3, {1, 3, 5}), (4, 0, set())]
)
def test_uniform_spreads_the_dropped_layers(sites, dropped, first):
    order = uniform_order(sites, dropped).tolist()
    assert set(order[:dropped]) == first
    assert sorted(order) == list(range(sites))


@pytest.mark.parametrize("sparsity, nearest", [(0.25, 0.2), (0.31, 0.4), (0.0, 0.0)])
def test_the_target_is_the_nearest_whole_number_of_layers_and_it_says_so(
    model, caplog, sparsity, nearest
):
    method = fitted(model, sparsity=sparsity)
    assert method.achievable(sparsity) == pytest.approx(nearest)
    assert len(dropped_layers(method)) == round(nearest * LAYERS)
    assert ("dropping" in caplog.text) == (nearest != sparsity)


def test_it_is_static_and_a_method_that_asks_a_router_anywhere_is_not(model):
    assert fitted(model).static() and fitted(model, policy="attention_first").static()

    class HalfStatic(LayerSkip):
        def fixed(self):
            return dict(list(super().fixed().items())[1:])

    assert not attach(model, HalfStatic(sparsity=0.4)).static()


def test_healing_trains_adapters_on_the_shortened_model(model):
    method = attach(model, LayerSkip(sparsity=0.4, policy="early_exit", lora={"rank": 2}))
    losses, rates = [], []

    def rows(_):
        return small_ids(4, 16, seed=5)

    loop = Loop(
        model,
        method,
        probe_of(model, method),
        rows,
        objective="lm",
        seed=0,
        on_step=lambda _, figures: (
            losses.append(figures["loss"]),
            rates.append(figures["sparsity"]),
        ),
    )
    method.fit(loop.probe)
    budget = StageBudget(12, 4, 16)
    (stage,) = method.stages(Budget("x", 8, 8, 8, budget, budget, budget))
    stage.lr = 0.02
    loop.run(stage)
    ids = rows(None)
    with torch.no_grad():
        untouched = without(model, {3, 4})(input_ids=ids, labels=ids).loss
        with routed(model, method):
            healed = model(input_ids=ids, labels=ids).loss
    assert losses[0] == pytest.approx(float(untouched), rel=1e-3)
    assert healed < untouched - 0.05
    assert rates == pytest.approx([0.4] * 12)
