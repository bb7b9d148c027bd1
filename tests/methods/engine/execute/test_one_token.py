"""Decoding one sequence of a linear method against the masked path, for every family."""

from __future__ import annotations

import pytest
import torch

from methods.base import LinearUnit, Method, Site
from methods.engine.cache.growing import preallocated_cache
from methods.engine.decoder.families import FAMILIES
from methods.engine.execute.one_token import OneToken
from methods.engine.routed import routed
from methods.engine.routing import routing_of
from tests.methods.conftest import PLAIN, small_ids
from tests.methods.engine.execute.test_gathered import windowed
from tests.methods.engine.scripted import all_sites

WIDTH, RANK = 32, 5


class Linear(Method):
    """Random linear scores and low-rank estimates, the same whichever way they are asked."""

    def __init__(
        self,
        sites: list[Site],
        threshold: float,
        *,
        forecast: bool,
        silu: bool,
        reserve: int = 0,
    ) -> None:
        super().__init__(sparsity=0.0)
        self.reserve = reserve
        self.where, self.forecast, self.silu = sites, forecast, silu
        self.threshold.fill_(threshold)
        generator = torch.Generator().manual_seed(3)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator) * 0.3

        self.parts = {
            site: LinearUnit(
                draw(WIDTH), draw(), draw(RANK, WIDTH), draw(RANK), draw(WIDTH, RANK), draw(WIDTH)
            )
            for site in sites
        }

    def sites(self):
        return self.where

    def route(self, site, x_BTD, ctx):
        part = self.parts[site]
        return self.decide(x_BTD @ part.score_D + part.offset)

    def approximate(self, site, x_BTD):
        if not self.forecast:
            return None
        part = self.parts[site]
        hidden = x_BTD @ part.down_rD.T + part.down_bias_r
        hidden = torch.nn.functional.silu(hidden) if self.silu else hidden
        return hidden @ part.up_Dr.T + part.bias_D

    def linear(self, site):
        part = self.parts[site]
        if not self.forecast:
            return LinearUnit(part.score_D, part.offset)
        return LinearUnit(**{**vars(part), "silu": self.silu})


@torch.no_grad()
def decoded(model, method, ids, mask, mode):
    """Logits of a prompt of 6 tokens and of every later token, one at a time; and the counts."""
    with routed(model, method, mode):
        cache, parts = preallocated_cache(model), []
        for start, end in [(0, 6), *((t, t + 1) for t in range(6, ids.shape[1]))]:
            seen = None if mask is None else mask[:, :end]
            out = model(input_ids=ids[:, start:end], attention_mask=seen, past_key_values=cache)
            parts.append(out.logits)
        return torch.cat(parts, 1), routing_of(model).counters.read()


@pytest.fixture
def taken(monkeypatch):
    """Sites that the path under test has run."""
    seen, call = [], OneToken.__call__

    def note(self, unit):
        done = call(self, unit)
        seen.extend([] if done is None else [unit.site])
        return done

    monkeypatch.setattr(OneToken, "__call__", note)
    return seen


@pytest.mark.parametrize("threshold", [-100.0, 0.0, 100.0], ids=["all", "some", "none"])
@pytest.mark.parametrize("granularity", ["unit", "block"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_equals_masked(family, granularity, threshold, taken):
    model, ids = windowed(family, 5), small_ids(1, 12)
    sites = all_sites(model, granularity)
    method = Linear(sites, threshold, forecast=True, silu=granularity == "unit")
    expected, usage = decoded(model, method, ids, None, "masked")
    assert not taken
    out, counted = decoded(model, method, ids, None, "gathered")
    assert torch.allclose(out, expected, atol=2e-4)
    assert counted == usage
    assert len(taken) == len(sites) * 6 or family not in PLAIN


@pytest.mark.parametrize("forecast", [True, False])
def test_padding_before_the_prompt_is_not_seen(forecast, taken):
    model, ids = windowed("llama", None), small_ids(1, 12)
    mask = torch.ones_like(ids)
    mask[:, :2] = 0
    method = Linear(all_sites(model, "unit"), 0.0, forecast=forecast, silu=False)
    expected, usage = decoded(model, method, ids, mask, "masked")
    out, counted = decoded(model, method, ids, mask, "gathered")
    assert taken and counted == usage
    assert torch.allclose(out[:, 2:], expected[:, 2:], atol=2e-4)


@torch.no_grad()
def test_hooks_on_projections_run(taken):
    """Also one that comes after the path has read the layer."""
    model, ids, seen = windowed("llama", None), small_ids(1, 3), []
    method = Linear(all_sites(model, "unit"), -100.0, forecast=True, silu=False)
    with routed(model, method, "gathered"):
        cache = model(input_ids=ids[:, :1], use_cache=True).past_key_values
        model(input_ids=ids[:, 1:2], past_key_values=cache)
        part = model.model.layers[0].mlp.up_proj
        part.register_forward_hook(lambda *_: seen.append(1))
        model(input_ids=ids[:, 2:], past_key_values=cache)
    assert taken and seen == [1]


def test_other_projections_are_called(taken):
    """Anything but a plain linear layer in a unit's place has to be called."""

    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model, ids = windowed("llama", None), small_ids(1, 9)
    for name in ("self_attn.o_proj", "mlp.up_proj"):
        old = model.model.layers[0].get_submodule(name)
        new = Doubled(old.in_features, old.out_features, bias=False).requires_grad_(False)
        new.weight.copy_(old.weight)
        model.model.layers[0].set_submodule(name, new)
    method = Linear(all_sites(model, "unit"), 0.0, forecast=True, silu=False)
    expected, _ = decoded(model, method, ids, None, "masked")
    out, _ = decoded(model, method, ids, None, "gathered")
    assert torch.allclose(out, expected, atol=2e-4)
    assert {site.layer for site in taken} == {1}
