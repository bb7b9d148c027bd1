"""Static forecasts: orders written out, and a distillation that moves what is bypassed only."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional

from methods.base import Budget, Site, StageBudget
from methods.engine.routed import attach, routed
from methods.parts.static_order import greedy_loss, split_by_loss
from methods.static_forecast import StaticForecast
from runners.training.loop import Loop
from tests.methods.conftest import small_ids, small_model
from tests.methods.test_layer_skip import LAYERS, hidden_streams, probe_of

ROWS = StageBudget(8, 4, 16)
BUDGET = Budget("x", 64, 96, 16, ROWS, ROWS, ROWS)


@pytest.fixture
def model():
    return small_model(layers=LAYERS)


def trained(model, sparsity=0.4, **options):
    """The recipe, run; the loop of its stages beside the method."""
    method = attach(model, StaticForecast(sparsity=sparsity, rank=4, **options))
    probe = probe_of(model, method)
    loop = Loop(
        model, method, probe, lambda _: small_ids(8, 16, seed=5), objective="distill", seed=0
    )
    for stage in method.stages(BUDGET):
        loop.run(stage)
    method.calibrate(probe, sparsity)
    return method.eval()


def bypassed(method):
    return [site for site, runs in method.fixed().items() if not runs]


def outputs(model, ids):
    """Per unit: (normalised input, output) of the untouched model, each [tokens, width]."""
    seen, hooks = {}, []
    for i, layer in enumerate(model.model.layers):
        for site, module in (
            (Site(i, "attention"), layer.self_attn),
            (Site(i, "mlp"), layer.mlp),
        ):

            def note(_, args, kwargs, out, site=site):
                x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
                seen[site] = x, out[0] if isinstance(out, tuple) else out

            hooks.append(module.register_forward_hook(note, with_kwargs=True))
    with torch.no_grad():
        hidden_streams(model, ids)
    for hook in hooks:
        hook.remove()
    return seen


def test_expected_harm_is_the_log_error_and_the_log_slope(model):
    method = trained(model, kind_split=False)
    probe = probe_of(model, method)
    slopes = probe.sensitivity()
    harm = {}
    for site, (x, y) in outputs(model, small_ids(4, 16, seed=1)[:2]).items():
        error = (y - method.forecasters(site, x)).norm(dim=-1)
        harm[site] = float(error.log().mean().detach()) + torch.tensor(slopes[site]).log().item()
    order = sorted(harm, key=harm.__getitem__)
    assert set(bypassed(method)) == set(order[:4])


def test_greedy_loss_adds_the_forecast_that_hurts_least(model):
    method = trained(model, order="greedy_loss", group=1, candidates=10, tokens=32)
    ids, chosen = small_ids(4, 16, seed=1)[:2], []
    for count in range(4):
        losses = {}
        for site in set(method.sites()) - set(chosen):
            trial = copy.deepcopy(method)
            away = {*chosen, site}
            row = torch.tensor([s in away for s in method.sites()])
            trial.maps[count + 1] = row
            trial.calibrate(None, (count + 1) / len(row))
            with torch.no_grad(), routed(model, trial):
                logits = model(input_ids=ids).logits[:, :-1]
            target = ids[:, 1:].flatten()
            losses[site] = float(functional.cross_entropy(logits.flatten(0, 1), target))
        chosen.append(min(losses, key=losses.__getitem__))
    assert set(bypassed(method)) == set(chosen)


def test_the_kinds_share_a_map_as_the_loss_says():
    attention, mlps = ([Site(i, kind) for i in range(12)] for kind in ("attention", "mlp"))
    best = {6: 1, 12: 9, 18: 7}
    asked = []

    def loss(away):
        asked.append(away)
        number = sum(site.kind == "mlp" for site in away)
        return float((number - best[len(away)]) ** 2)

    maps = split_by_loss(attention, mlps, loss)
    assert [len(away) for away in maps] == list(range(25))
    for away in maps:
        taken = [[s for s in away if s.kind == kind] for kind in ("attention", "mlp")]
        assert taken == [attention[: len(taken[0])], mlps[: len(taken[1])]]
    counts = {n: sum(s.kind == "mlp" for s in maps[n]) for n in (6, 9, 12, 18, 21, 24)}
    assert counts == {6: 1, 9: 5, 12: 9, 18: 7, 21: 10, 24: 12}
    assert len(asked) < 30


@pytest.mark.parametrize("sparsity", [0.2, 0.5])
def test_the_split_is_no_worse_than_the_harms_of_both_kinds(model, sparsity):
    ids, losses = small_ids(4, 16, seed=1), {}
    for kind_split in (True, False):
        method = trained(model, sparsity=sparsity, kind_split=kind_split, tokens=64)
        with torch.no_grad(), routed(model, method):
            logits = model(input_ids=ids).logits[:, :-1]
        losses[kind_split] = float(
            functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        )
    assert losses[True] <= losses[False] + 1e-6


def test_greedy_rounds_take_groups_of_the_first_candidates():
    sites = [Site(layer, "mlp") for layer in range(6)]
    worth = dict(zip(sites, [5.0, 1.0, 3.0, 0.0, 4.0, 2.0], strict=True))
    asked = []

    def loss(away):
        asked.append(away)
        return worth[away[-1]]

    order = greedy_loss(sites, loss, group=2, candidates=3)
    assert [s.layer for s in order] == [1, 2, 3, 4, 0, 5]
    assert [len(away) for away in asked] == [1, 1, 1, 3, 3, 3]


def test_contiguous_bypasses_whole_layers_in_a_row(model):
    method = trained(model, sparsity=0.45, order="contiguous")
    sites = bypassed(method)
    layers = sorted({site.layer for site in sites})
    assert len(sites) == 2 * len(layers) == 4
    assert layers == [layers[0], layers[0] + 1]
    assert method.achievable(0.45) == pytest.approx(0.4)
    assert method.achievable(0.99) == pytest.approx(0.8)


@pytest.mark.parametrize("targets", [(), (0.2, 0.4)])
def test_distillation_lowers_the_divergence_and_moves_what_is_bypassed(model, targets):
    training = {"lr": 3e-3, "weight_decay": 0.0}
    start = trained(model)
    method = trained(model, train="forecasters", targets=targets, training=training)
    ids = small_ids(8, 16, seed=5)
    with torch.no_grad():
        teacher = model(input_ids=ids).logits.log_softmax(-1)
    divergence = []
    for each in (start, method):
        with torch.no_grad(), routed(model, each):
            student = model(input_ids=ids).logits.log_softmax(-1)
        divergence.append(
            float(functional.kl_div(student, teacher, log_target=True, reduction="batchmean"))
        )
    assert divergence[1] < 0.9 * divergence[0]
    moved = [
        site
        for site in method.sites()
        if not torch.equal(
            method.forecasters.at(site).up.weight, start.forecasters.at(site).up.weight
        )
    ]
    assert moved == bypassed(method)


def test_distillation_follows_finite_differences(model):
    """The gradient of a hard step is that of the divergence, through every later unit."""
    method = trained(model)
    ids = small_ids(2, 8)
    site = bypassed(method)[0]
    weight = method.forecasters.at(site).up.weight
    weight.requires_grad_(True)

    def loss():
        with routed(model, method, "gathered"):
            return model(input_ids=ids).logits.log_softmax(-1)[:, :, 3].mean()

    loss().backward()
    largest = int(weight.grad.abs().argmax())
    step, found = 1e-2, []
    for sign in (1, -1):
        with torch.no_grad():
            weight.view(-1)[largest] += sign * step
            found.append(float(loss()))
            weight.view(-1)[largest] -= sign * step
    slope = (found[0] - found[1]) / (2 * step)
    assert slope == pytest.approx(float(weight.grad.view(-1)[largest]), rel=0.03)
