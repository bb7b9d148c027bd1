"""What a method remembers within a forward: in the context, for every method in conf/method."""

from __future__ import annotations

import copy

import pytest
import torch

from methods.engine.routed import routed
from runners.point import build_method
from runners.point_config import PointConfig
from tests.conftest import token_rows


@pytest.fixture
def method(config, tiny_llama):
    """Untrained, with a threshold among its scores."""
    made = build_method(PointConfig.parse(config), tiny_llama).eval()
    scores = []
    with torch.no_grad(), routed(tiny_llama, made):
        tiny_llama.routing.observer = lambda site, decision, _: scores.append(decision.scores_BT)
        tiny_llama(input_ids=token_rows(2, 12))
    found = [s[s.isfinite()].flatten() for s in scores]
    made.threshold.fill_(float(torch.cat(found).median()) + 1e-4 if found else 0.5)
    return made


def held(method):
    """Names of tensors that a method's modules hold and that are neither parameter nor buffer."""

    def tensors(value):
        if isinstance(value, torch.Tensor):
            return True
        if isinstance(value, dict):
            return any(map(tensors, value.values()))
        if isinstance(value, (list, tuple, set)):
            return any(map(tensors, value))
        return hasattr(value, "__dataclass_fields__") and tensors(vars(value))

    kept = {"_parameters", "_buffers", "_modules"}
    return [
        f"{name}.{key}"
        for name, module in method.named_modules()
        for key, value in vars(module).items()
        if key not in kept and tensors(value)
    ]


def test_a_forward_leaves_no_tensor_on_the_method(tiny_llama, method):
    for mode in ("masked", "gathered"):
        with torch.no_grad(), routed(tiny_llama, method, mode) as model:
            cache = model(input_ids=token_rows(2, 9), use_cache=True).past_key_values
            model(input_ids=token_rows(2, 1, seed=1), past_key_values=cache)
            assert held(method) == []
            assert model.routing.call.memory == {}


def test_a_forward_within_a_forward_changes_nothing(tiny_llama, method):
    """Between a layer's attention and its MLP another sequence runs whole, on a copy."""
    ids, other = token_rows(2, 9), copy.deepcopy(tiny_llama)
    with torch.no_grad(), routed(tiny_llama, method), routed(other, method):
        alone = tiny_llama(input_ids=ids).logits
        hook = tiny_llama.model.layers[2].self_attn.register_forward_hook(
            lambda *_: other(input_ids=token_rows(2, 9, seed=7)) and None
        )
        interrupted = tiny_llama(input_ids=ids).logits
        hook.remove()
    assert torch.equal(interrupted, alone)
