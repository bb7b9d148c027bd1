"""Continuations that a routed model keeps, against generation step by step without a cache."""

from __future__ import annotations

import pytest
import torch

from methods.engine.routed import routed
from runners.base_model.load import Base
from runners.evaluation.generation import continuations, generation
from runners.point_config import ContinuationConfig
from tests.conftest import documents
from tests.runners.toy import toy

GALLERY = ("the people", "peace and duty, spoken about")
SETTINGS = ContinuationConfig(prompts=3, prompt_tokens=12, new_tokens=10, gallery=GALLERY)


@pytest.fixture
def base(tiny_llama, tokenizer):
    return Base(tiny_llama, tokenizer, "hash", "tiny", None)


def greedy(model, prompt, led=None):
    """Argmax at each position, from a whole pass over the text so far; the end is never chosen."""
    ids, chosen = list(prompt), []
    for place in range(SETTINGS.new_tokens):
        with torch.no_grad():
            scores = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        if model.generation_config.eos_token_id is not None:
            scores[model.generation_config.eos_token_id] = -torch.inf
        chosen.append(int(scores.argmax()))
        ids.append(chosen[-1] if led is None else led[place])
    return chosen


@pytest.mark.parametrize("mode", ["masked", "gathered"])
@pytest.mark.parametrize("threshold", [0.0, 0.3, float("inf")])
def test_as_step_by_step(base, mode, threshold):
    texts = [*documents(3), *documents(1, words=2)]
    dense = continuations(SETTINGS, base, texts)
    assert [len(prompt) for prompt in dense["prompts"]] == [12, 12, 12]
    for prompt, tokens in zip(dense["prompts"], dense["tokens"], strict=True):
        assert greedy(base.model, prompt) == tokens
    method = toy(base.model)
    method.threshold.fill_(threshold)
    found = generation(SETTINGS, base, dense, method=method, mode=mode)
    with routed(base.model, method, "masked") as model:
        pairs = list(zip(dense["prompts"], dense["tokens"], strict=True))
        led = [greedy(model, prompt, tokens) for prompt, tokens in pairs]
        alone = [greedy(model, prompt) for prompt, _ in pairs]
        free = [greedy(model, base.tokenizer(prompt)["input_ids"]) for prompt in GALLERY]
    same = torch.tensor(led) == torch.tensor(dense["tokens"])
    assert found["kept"]["value"] == pytest.approx(same.double().mean())
    spread = same.double().mean(1).std() / 3**0.5
    assert found["kept"]["stderr"] == pytest.approx(float(spread))
    until = [
        next((i for i, (a, b) in enumerate(zip(own, tokens, strict=True)) if a != b), 10)
        for own, tokens in zip(alone, dense["tokens"], strict=True)
    ]  # of the text that the routed model writes by itself
    assert found["prefix"]["per_prompt"] == pytest.approx([n / 10 for n in until])
    texts = [base.tokenizer.decode(ids) for ids in free]
    assert [entry["text"] for entry in found["gallery"]] == texts
    assert [entry["prompt"] for entry in found["gallery"]] == list(GALLERY)


def test_dense_keeps_all_of_its_own(base):
    dense = continuations(SETTINGS, base, documents(2))
    found = generation(SETTINGS, base, dense)
    assert (found["kept"]["value"], found["kept"]["stderr"], found["kept"]["n"]) == (1.0, 0.0, 2)
    assert found["prefix"]["value"] == 1.0
    assert all(entry["text"] == entry["dense"] for entry in found["gallery"])


def test_short_documents_give_short_prompts(base):
    """In one batch, padded on the left; a single prompt has no standard error."""
    dense = continuations(SETTINGS, base, [*documents(1, words=1), *documents(1)])
    lengths = [len(prompt) for prompt in dense["prompts"]]
    assert lengths[0] < lengths[1] == 12
    for prompt, tokens in zip(dense["prompts"], dense["tokens"], strict=True):
        assert greedy(base.model, prompt) == tokens
    alone = continuations(SETTINGS, base, documents(1))
    assert generation(SETTINGS, base, alone)["kept"]["stderr"] is None
