"""Attaching a method to a model, using the model meanwhile, and taking it off again."""

from __future__ import annotations

import pytest
import torch

from methods.base import BrokenContract, Method, Site
from methods.engine.routed import attach, routed
from methods.engine.routing import routing_of
from methods.random import Random
from tests.methods.conftest import small_ids, small_model
from tests.methods.engine.scripted import Scripted, all_sites, padded, random_maps, random_tables


def scripted(model, *, granularity="unit", rows=2):
    sites = all_sites(model, granularity)
    return Scripted(random_tables(sites, rows=rows), random_maps(sites, 32))


def traces(model):
    """Whatever `routed` may have left behind."""
    modules = list(model.modules())
    return [
        hasattr(model, "routing"),
        any("forward" in module.__dict__ for module in modules),
        any(module._forward_pre_hooks or module._forward_hooks for module in modules),
    ]


@pytest.mark.parametrize("fault", [None, "body", "method"])
def test_the_model_is_restored_on_any_exit(family_model, fault, monkeypatch):
    ids = small_ids(2, 6)
    before = family_model(input_ids=ids).logits
    weights = {name: value.clone() for name, value in family_model.state_dict().items()}
    clean, method = traces(family_model), scripted(family_model)
    if fault == "method":
        monkeypatch.setattr(method, "approximate", lambda site, x: 1 / 0)

    def use():
        with routed(family_model, method):
            family_model(input_ids=ids)
            assert traces(family_model) == [True, True, False]
            if fault == "body":
                raise ZeroDivisionError

    if fault:
        with pytest.raises(ZeroDivisionError):
            use()
    else:
        use()
    assert traces(family_model) == clean == [False, False, False]
    assert torch.equal(family_model(input_ids=ids).logits, before)
    assert all(torch.equal(family_model.state_dict()[k], v) for k, v in weights.items())
    assert not any(parameter.requires_grad for parameter in family_model.parameters())


def test_trainable_weights_stay_trainable():
    model = small_model().requires_grad_(True)
    with routed(model, scripted(model)):
        routing_of(model).training = True
        model(input_ids=small_ids(2, 6)).logits.sum().backward()
    assert all(p.requires_grad and p.grad is not None for p in model.parameters())


def test_a_forward_that_somebody_else_replaced_is_put_back():
    model = small_model()
    layer = model.model.layers[0]
    original, calls = layer.forward, []

    def wrapper(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    layer.forward = wrapper
    with routed(model, scripted(model)):
        pass
    assert layer.forward is wrapper
    model(input_ids=small_ids(1, 4))
    assert calls == [1]


def test_a_second_wrap_is_refused_and_harms_nothing():
    model, ids = small_model(), small_ids(2, 6)
    method = scripted(model)
    with routed(model, method):
        first = model(input_ids=ids).logits
        with pytest.raises(ValueError, match="already routed"), routed(model, scripted(model)):
            pass
        assert torch.equal(model(input_ids=ids).logits, first)
    assert traces(model) == [False, False, False]
    with routed(model, method):
        assert torch.equal(model(input_ids=ids).logits, first)


@pytest.mark.parametrize("bad", [Site(2, "mlp"), Site(-1, "attention"), Site(0, "norm")])
def test_a_site_outside_the_model_is_refused(bad):
    model = small_model()
    with pytest.raises(ValueError, match="outside the model"), routed(model, Scripted({bad: None})):
        pass
    assert traces(model) == [False, False, False]


def test_an_unknown_mode_is_refused():
    model = small_model()
    with pytest.raises(ValueError, match="mode must be one of masked"):
        routed(model, scripted(model), mode="fast").__enter__()


def test_routing_of_needs_a_routed_model():
    with pytest.raises(ValueError, match="not inside"):
        routing_of(small_model())


def test_attach_puts_modules_on_the_models_device():
    model = small_model()
    method = attach(model, Random(sparsity=0.5, bypass="forecast", rank=2))
    assert method.shape.layers == 2 and method.shape.width == 32
    assert {p.device for p in method.parameters()} == {model.device}


def test_the_dense_pause_runs_the_untouched_model_and_counts_nothing():
    model, ids = small_model(), small_ids(2, 6)
    dense = model(input_ids=ids).logits
    with routed(model, scripted(model)):
        routing = routing_of(model)
        with routing.dense():
            assert torch.equal(model(input_ids=ids).logits, dense)
        assert routing.counters.read().tokens == 0
        assert not torch.allclose(model(input_ids=ids).logits, dense, atol=0.1)
        assert routing.counters.read().tokens == 12


def generate(model, method, ids, mask, mode="masked", **options):
    """(new tokens [B, N], logits of each step [B, N, V])."""
    with torch.no_grad(), routed(model, method, mode):
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=6,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            **options,
        )
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, 1)


@pytest.mark.parametrize("granularity", ["unit", "block"])
def test_generate_with_left_padding_equals_each_row_alone(family_model, granularity):
    pads, ids = (0, 4, 6), small_ids(3, 9)
    method = scripted(family_model, granularity=granularity, rows=3)
    tokens, logits = generate(family_model, method, *padded(ids, pads, "left"))
    for row, pad in enumerate(pads):
        method.rows = [row]
        prompt = ids[row : row + 1, : 9 - pad]
        alone, alone_logits = generate(family_model, method, prompt, torch.ones_like(prompt))
        assert torch.allclose(logits[row], alone_logits[0], atol=2e-4)
        assert torch.equal(tokens[row], alone[0])
        whole = torch.cat([prompt, alone], 1)
        with torch.no_grad(), routed(family_model, method):
            one_pass = family_model(input_ids=whole).logits[0, 8 - pad : -1]
        assert torch.allclose(alone_logits[0], one_pass, atol=2e-4)


def test_generate_with_a_static_cache_equals_the_dynamic_one():
    model = small_model()
    method, (ids, mask) = scripted(model), padded(small_ids(2, 9), (0, 4), "left")
    _, expected = generate(model, method, ids, mask)
    _, found = generate(model, method, ids, mask, cache_implementation="static")
    assert torch.allclose(found, expected, atol=2e-4)


def test_method_sees_normalised_input_residual_and_state():
    model, ids = small_model(), small_ids(2, 6)
    seen = {}

    class Spy(Scripted):
        def route(self, site, x_BTD, ctx):
            seen[site] = (x_BTD, ctx)
            return super().route(site, x_BTD, ctx)

    spy = Spy(random_tables(all_sites(model, "unit"), rows=2))
    with torch.no_grad(), routed(model, spy):
        routing = routing_of(model)
        routing.training, routing.anneal = True, 0.25
        model(*padded(ids, (0, 2), "right"))
    for site, (x, ctx) in seen.items():
        layer = model.model.layers[site.layer]
        name = "input_layernorm" if site.kind == "attention" else "post_attention_layernorm"
        assert torch.equal(x, getattr(layer, name)(ctx.residual_BTD))
        assert ctx.training and ctx.anneal == 0.25
        assert ctx.valid_BT.sum(1).tolist() == [6, 4]
        assert ctx.positions_BT[0].tolist() == [0, 1, 2, 3, 4, 5]
    embedded = model.model.embed_tokens(padded(ids, (0, 2), "right")[0])
    assert torch.equal(seen[Site(0, "attention")][1].residual_BTD, embedded)
    assert list(seen) == all_sites(model, "unit")
    assert set(routing.decisions) == set(seen)


class OneRow(Method):
    """Breaks the contract in one of several ways."""

    def __init__(self, fault):
        super().__init__(sparsity=0.3)
        self.fault = fault

    def route(self, site, x_BTD, ctx):
        scores = ctx.residual_BTD.norm(dim=-1)
        if self.fault == "tensor":
            return scores
        decision = self.decide(scores)
        if self.fault == "dtype":
            decision.execute_BT = decision.execute_BT.long()
        elif self.fault != "approximate":
            setattr(decision, self.fault, getattr(decision, self.fault)[:1])
        return decision

    def approximate(self, site, x_BTD):
        return torch.zeros(x_BTD.shape[-1]) if self.fault == "approximate" else None


FAULTS = {
    "tensor": r"route\(\) gave a Tensor: return self.decide",
    "dtype": r"route\(\) gave execute_BT in torch.int64, not bool",
    "execute_BT": r"route\(\) gave execute_BT of shape \[1, 7\], not \[B, T\] = \[2, 7\]",
    "scores_BT": r"route\(\) gave scores_BT of shape \[1, 7\], not \[B, T\] = \[2, 7\]",
    "approximate": r"approximate\(\) gave \[32\], not \[\d, \d+, 32\]",
}


@pytest.mark.parametrize("mode", ["masked", "gathered"])
@pytest.mark.parametrize("fault", FAULTS)
def test_what_would_be_broadcast_over_the_batch_is_refused(fault, mode):
    model = small_model()
    method = attach(model, OneRow(fault))
    method.threshold.fill_(1e9 if fault == "approximate" else 0.0)
    with (
        pytest.raises(BrokenContract, match=f"OneRow at 0_attention: {FAULTS[fault]}") as raised,
        torch.no_grad(),
        routed(model, method, mode),
    ):
        model(input_ids=small_ids(2, 7))
    assert "\n" not in str(raised.value)
