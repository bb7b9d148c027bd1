"""What every method in conf/method must do; a new one is tested here without an edit."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import PreTrainedModel

from methods.base import Method
from methods.engine.checkpoint import from_pretrained, save_pretrained
from methods.engine.decoder.families import FAMILIES
from methods.engine.routed import routed
from runners.base_model.load import build_budget
from runners.point import build_method
from runners.point_config import PointConfig
from tests.conftest import token_rows
from tests.methods.conftest import METHODS, method_config, probe_for, small_model

SPARSITY = 0.4


FAMILY_METHOD = "informed"
"""Routes every unit, forecasts and trains: what every family is tested with."""
CASES = [*METHODS, *(f"{FAMILY_METHOD}-{name}" for name in sorted(FAMILIES) if name != "llama")]
PAIRS: dict[str, tuple[PreTrainedModel, Method]] = {}
"""A model and the method that was trained on it once for all tests; each gets a copy."""


@pytest.fixture(params=CASES)
def case(request) -> str:
    """A method, and a family if it is another than Llama."""
    return request.param


@pytest.fixture
def config(case):
    return method_config(case.partition("-")[0], "sparsity=0.4")


@pytest.fixture
def base(case, tiny_llama):
    """Random and frozen; of the families with everything that their config may say."""
    family = case.partition("-")[2]
    return small_model(family, layers=3, width=64, vocab_size=259) if family else tiny_llama


@pytest.fixture
def pair(case, config, base, trained):
    if case not in PAIRS:
        PAIRS[case] = base, trained(config, base)
    return copy.deepcopy(PAIRS[case])


@pytest.fixture
def model(request, base):
    """As loaded, or beside a method that was trained on it."""
    return request.getfixturevalue("pair")[0] if "method" in request.fixturenames else base


@pytest.fixture
def method(pair):
    return pair[1]


def logits_of(model, method, ids, mode="masked", **kwargs):
    with torch.no_grad(), routed(model, method, mode) as routed_model:
        out = routed_model(input_ids=ids, **kwargs).logits
        return out, routed_model.routing.counters.read()


def test_all_executed_equals_dense(config, model, method):
    """Fine-tuned adapters apart: they make another dense model."""
    ids = token_rows(3, 20)
    method.adapter = None
    method.threshold.fill_(float("-inf"))
    out, usage = logits_of(model, method, ids)
    assert torch.equal(out, model(input_ids=ids).logits)
    assert usage.sparsity() == 0.0


def test_target_is_met_on_calibration_text(config, model, method):
    probe = probe_for(model, method)
    realised = probe.routed_scores(float(method.threshold)).sparsity
    assert realised == pytest.approx(method.achievable(SPARSITY), abs=0.01)


def test_calibration_says_what_a_pass_of_its_own_measures(config, model, method):
    probe = probe_for(model, method)
    said = method.calibrate(probe, SPARSITY)
    if said is None:
        pytest.skip("calibrates without a pass")
    assert said == pytest.approx(probe.routed_scores(float(method.threshold)).sparsity, abs=1e-9)


def test_routing_changes_the_output(config, model, method):
    if not method.sites():
        pytest.skip("routes nowhere")
    ids = token_rows(2, 20)
    out, usage = logits_of(model, method, ids)
    assert usage.sparsity() > 0.1
    assert not torch.allclose(out, model(input_ids=ids).logits, atol=1e-3)


def test_evaluation_is_deterministic(config, model, method):
    ids = token_rows(3, 20)
    first, _ = logits_of(model, method, ids)
    torch.manual_seed(99)
    second, _ = logits_of(model, method, ids)
    assert torch.equal(first, second)


def test_causal(config, model, method):
    ids = token_rows(2, 20)
    changed = ids.clone()
    changed[:, 12:] = token_rows(2, 8, seed=5)
    first, _ = logits_of(model, method, ids)
    second, _ = logits_of(model, method, changed)
    assert torch.allclose(first[:, :12], second[:, :12], atol=1e-5)
    assert not torch.allclose(first[:, 12:], second[:, 12:], atol=1e-3)


def test_prefill_chunks_and_decode_equal_one_pass(config, model, method):
    ids = token_rows(2, 20)
    whole, _ = logits_of(model, method, ids)
    with torch.no_grad(), routed(model, method):
        cache, parts = None, []
        for start, end in ((0, 7), (7, 17), (17, 18), (18, 19), (19, 20)):
            out = model(input_ids=ids[:, start:end], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_neither_counted_nor_seen(config, model, method, side):
    ids, pad = token_rows(1, 14), torch.zeros(1, 6, dtype=torch.long)
    mask = torch.ones_like(ids)
    parts = [(pad, pad), (ids, mask)] if side == "left" else [(ids, mask), (pad, pad)]
    tokens, masks = (torch.cat(x, 1) for x in zip(*parts, strict=True))
    alone, usage_alone = logits_of(model, method, ids)
    padded, usage = logits_of(model, method, tokens, attention_mask=masks)
    assert torch.allclose(padded[masks.bool()], alone[0], atol=1e-4)
    assert usage.tokens == usage_alone.tokens == 14
    assert usage.executed == usage_alone.executed


def test_gathered_equals_masked(config, model, method):
    ids = token_rows(3, 20)
    masked, usage = logits_of(model, method, ids)
    gathered, usage_gathered = logits_of(model, method, ids, mode="gathered")
    assert torch.allclose(gathered, masked, atol=1e-4)
    assert usage_gathered.executed == usage.executed


@pytest.mark.parametrize("pads", [0, 3])
@pytest.mark.parametrize("mode", ["masked", "gathered"])
def test_first_tokens_are_executed_in_every_unit(config, model, mode, pads):
    """Where everything else is bypassed, in one pass and token by token, from the first on."""
    method = build_method(PointConfig.parse({**config, "reserve": 3}), model)
    method.threshold.fill_(float("inf"))
    ids, mask = token_rows(2, 8), torch.ones(2, 8, dtype=torch.long)
    mask[1, :pads] = 0
    whole, usage = logits_of(model, method, ids, mode, attention_mask=mask)
    assert set(usage.decided.values()) <= {2 * 3}
    with torch.no_grad(), routed(model, method, mode):
        cache, parts = None, []
        for end in range(1, 9):
            out = model(
                input_ids=ids[:, end - 1 : end],
                attention_mask=mask[:, :end],
                position_ids=(mask.cumsum(1) - 1).clamp_min(0)[:, end - 1 : end],
                past_key_values=cache,
                use_cache=True,
            )
            cache = out.past_key_values
            parts.append(out.logits)
        counted = model.routing.counters.read()
    assert counted.decided == usage.decided
    assert torch.allclose(torch.cat(parts, 1)[mask.bool()], whole[mask.bool()], atol=1e-4)


def test_batch_rows_are_independent(config, model, method):
    ids = token_rows(3, 16)
    together, _ = logits_of(model, method, ids)
    for row in range(3):
        alone, _ = logits_of(model, method, ids[row : row + 1])
        assert torch.allclose(together[row], alone[0], atol=1e-5)


def test_base_model_is_untouched(config, model, trained):
    before = copy.deepcopy(model.state_dict())
    forwards = [layer.forward.__func__ for layer in model.model.layers]
    trained(config, model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert [layer.forward.__func__ for layer in model.model.layers] == forwards
    assert not hasattr(model, "routing")
    assert all(not p.requires_grad and p.grad is None for p in model.parameters())


def test_save_and_load_round_trip(config, model, method, tmp_path):
    target = config["method"]["_target_"]
    options = PointConfig.parse(config).method_options
    method.reserve = 3
    save_pretrained(method, tmp_path, target=target, options=options, base={})
    again = from_pretrained(tmp_path, model)
    assert again.reserved == 3
    ids = token_rows(2, 16)
    assert torch.equal(logits_of(model, method, ids)[0], logits_of(model, again, ids)[0])
    suffixes = {path.suffix for path in tmp_path.iterdir()}
    assert suffixes == {".json", ".safetensors"}


def test_recipe_is_reproducible(config, model, method, trained):
    again = trained(config, model)
    for (name, a), b in zip(method.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_shared_stages_do_not_depend_on_the_target(config, model, trained):
    name = config["method"]["name"]
    states = []
    for sparsity in (0.2, 0.6):
        other = method_config(name, f"sparsity={sparsity}")
        method = build_method(PointConfig.parse(other), model)
        budget = build_budget(PointConfig.parse(other).budget)
        states.append({s.name: s.per_target for s in method.stages(budget)})
        probe = probe_for(model, method)
        method.fit(probe)
        for stage in method.stages(budget):
            if stage.fit is not None and not stage.per_target:
                torch.manual_seed(0)
                stage.fit(probe)
        states.append(method.state_dict())
    assert states[0] == states[2]
    for key, value in states[1].items():
        assert torch.equal(value, states[3][key]), key


def test_generate(config, model, method):
    ids = token_rows(2, 8)
    with routed(model, method) as routed_model:
        out = routed_model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
        step = ids
        for _ in range(5):
            logits = routed_model(input_ids=step).logits[:, -1]
            step = torch.cat([step, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(out, step)
