"""`torch.compile` of a routed model: the same logits and the same counts."""

from __future__ import annotations

import pytest
import torch

from methods.engine.cache.growing import preallocated_cache
from methods.engine.routed import attach, routed
from methods.engine.routing import routing_of
from methods.informed import Informed
from tests.methods.conftest import small_ids, small_model


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@torch.no_grad()
def informed(model):
    torch.manual_seed(4)
    method = attach(model, Informed(sparsity=0.5, rank=4)).eval()
    for parameter in method.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    method.threshold.fill_(0.1)
    return method


@torch.no_grad()
def prefill_and_decode(model, call, ids):
    cache = preallocated_cache(model)
    parts = [call(input_ids=ids[:, :8], past_key_values=cache).logits]
    parts.append(call(input_ids=ids[:, 8:], past_key_values=cache).logits)
    return torch.cat(parts, 1)


@pytest.mark.parametrize(("mode", "backend"), [("masked", "eager"), ("gathered", "aot_eager")])
def test_compiled_equals_uncompiled(mode, backend):
    model, ids = small_model(layers=1), small_ids(1, 9)
    with routed(model, informed(model), mode):
        expected = prefill_and_decode(model, model, ids)
        usage = routing_of(model).counters.read()
        assert 0.2 < usage.sparsity() < 0.8
        routing_of(model).reset_counters()
        compiled = torch.compile(model, backend=backend)
        out = prefill_and_decode(model, compiled, ids)
        assert torch.allclose(out, expected, atol=1e-5)
        assert routing_of(model).counters.read() == usage


@torch.no_grad()
def test_a_compiled_model_is_routed_only_inside_the_block():
    model, ids = small_model(layers=1), small_ids(2, 10)
    dense, method = model(input_ids=ids).logits, informed(model)
    compiled = torch.compile(model, backend="eager")
    assert torch.allclose(compiled(input_ids=ids).logits, dense, atol=1e-5)
    with routed(model, method, "gathered"):
        sparse = model(input_ids=ids).logits
        assert not torch.allclose(sparse, dense, atol=1e-3)
        assert torch.allclose(compiled(input_ids=ids).logits, sparse, atol=1e-5)
    assert torch.allclose(compiled(input_ids=ids).logits, dense, atol=1e-5)
