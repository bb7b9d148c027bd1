"""informed_plus: what each part does to the recipe, and its gate against the equation."""

from __future__ import annotations

import math

import pytest
import torch

from methods.base import Shape, Site
from methods.engine.checkpoint import from_pretrained, save_pretrained
from methods.engine.routed import attach, routed
from methods.informed_plus import InformedPlus
from runners.base_model.load import build_budget
from runners.point import build_method
from runners.point_config import PointConfig
from tests.conftest import token_rows
from tests.methods.by_hand import train_forward
from tests.methods.conftest import method_config, probe_for

CONFIG = method_config("informed_plus", "sparsity=0.5")


def recipe(**options):
    method = InformedPlus(sparsity=0.5, rank=4, **options)
    method.setup(Shape(2, 32, 2, 1, 16, 48, 61))
    return [
        (stage.name, stage)
        for stage in method.stages(build_budget(PointConfig.parse(CONFIG).budget))
    ]


@pytest.mark.parametrize(
    ("without", "names"),
    [
        ([], ["forecasters", "router_start", "kind_shift", "distill"]),
        (["kind_shift"], ["forecasters", "router_start", "distill"]),
        (["closed_form"], ["distill"]),
        (["distillation"], ["forecasters", "router_start", "kind_shift"]),
    ],
)
def test_parts_are_stages(without, names):
    assert [name for name, _ in recipe(without=without)] == names


def test_parts_change_the_distillation():
    usual = dict(recipe())["distill"]
    assert usual.hold > 0 and usual.hard and usual.per_target
    whole = dict(recipe(train="end_to_end"))["distill"]
    assert not whole.hard and 0 < len(usual.parameters) < len(whole.parameters)
    assert not dict(recipe(without=["closed_form"]))["distill"].hard, "routers start at random"
    assert dict(recipe(without=["controller"]))["distill"].hold == 0
    shared = dict(recipe(targets=[0.3, 0.5]))
    assert list(shared) == ["forecasters", "router_start", "kind_shift", "distill"]
    assert not shared["distill"].per_target


def test_gate_is_hard_with_the_sigmoids_gradient(tiny_llama):
    method = attach(
        tiny_llama, InformedPlus(sparsity=0.5, rank=4, training={"tau_start": 0.7, "tau_end": 0.7})
    )
    method.threshold.fill_(0.1)
    _, decisions = train_forward(tiny_llama, method, token_rows(2, 12))
    decision = decisions[Site(1, "mlp")]
    scores = decision.scores_BT
    assert torch.equal(decision.execute_BT, scores > 0.1)
    assert torch.allclose(decision.gate_BT, (scores > 0.1).float())
    (gradient,) = torch.autograd.grad(decision.gate_BT.sum(), scores)
    soft = torch.sigmoid((scores.detach() - 0.1) / 0.7)
    assert torch.allclose(gradient, soft * (1 - soft) / 0.7, atol=1e-6)


def test_scores_are_harm_per_flop(tiny_llama):
    """Against the routers without: lower by half the log of what a bypass saves at each unit."""
    shifts = {}
    for without in ([], ["per_flop"]):
        torch.manual_seed(0)
        method = attach(tiny_llama, InformedPlus(sparsity=0.5, rank=4, neurons=8, without=without))
        probe = probe_for(tiny_llama, method)
        for stage in list(method.stages(build_budget(PointConfig.parse(CONFIG).budget)))[:2]:
            stage.fit(probe)
        for site in method.sites():
            shifts.setdefault(site, []).append(method.routers.at(site).head.bias.item())
    width, mlp_width, keys = 64, tiny_llama.config.intermediate_size, 32 / 2
    heads = tiny_llama.config.num_attention_heads
    full = {"mlp": 6 * width * mlp_width, "attention": 4 * width * width + 4 * keys * width}
    assert heads * method.shape.head_dim == width
    for site, (per_flop, plain) in shifts.items():
        rank = method.forecasters.at(site).rank
        estimate = 4 * width * rank + (6 * width * 8 if site.kind == "mlp" else 0)
        saved = full[site.kind] - estimate
        assert plain - per_flop == pytest.approx(math.log(saved) / 2, abs=1e-4)


def test_keys_follow_the_ranks(tiny_llama, trained):
    """Keys are forecast from forecasters that have just got other ranks."""
    config = method_config("informed_plus", "sparsity=0.4", "method.kv_policy=forecast")
    method = trained(config, tiny_llama)
    ranks = {method.forecasters.at(site).rank for site in method.sites()}
    assert len(ranks) > 1
    for site in method.keys.sites:
        assert method.keys.at(site).in_features == method.forecasters.at(site).rank


def test_allocated_ranks_survive_saving(tiny_llama, tmp_path):
    config = method_config("informed_plus", "sparsity=0.4")
    method = build_method(PointConfig.parse(config), tiny_llama)
    method.forecasters.solve(probe_for(tiny_llama, method))
    ranks = [method.forecasters.at(site).rank for site in method.sites()]
    assert len(set(ranks)) > 1 and sum(ranks) == 4 * len(ranks)
    method.threshold.fill_(0.0)
    options = PointConfig.parse(config).method_options
    save_pretrained(method, tmp_path, target=config["method"]["_target_"], options=options, base={})
    again = from_pretrained(tmp_path, tiny_llama)
    assert [again.forecasters.at(site).rank for site in again.sites()] == ranks
    ids = token_rows(2, 12)
    with torch.no_grad():
        found = []
        for one in (method, again):
            with routed(tiny_llama, one):
                found.append(tiny_llama(input_ids=ids).logits)
    assert torch.equal(*found)
