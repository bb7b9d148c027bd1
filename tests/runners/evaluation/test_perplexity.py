"""Perplexity against brute force: one token at a time; intervals by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from runners.corpus.source import Document
from runners.errors import UserError
from runners.evaluation.perplexity import first_tokens, perplexity, windows_of
from runners.evaluation.scores import perplexity_interval
from runners.point_config import PointConfig, WindowConfig
from tests.conftest import compose_tiny, documents

SIZES = WindowConfig(context=512, stride=512, batch_size=4)


def brute_force(model, tokenizer, texts, *, tokens, context, stride):
    """Negative log-likelihoods per document, each token from a forward pass of its own."""
    found = []
    for text in texts:
        ids = tokenizer(text.text)["input_ids"][:tokens]
        losses = []
        for place in range(1, len(ids)):
            start = 0
            while start + context < place:
                start += stride
            logits = model(input_ids=torch.tensor([ids[start:place]])).logits[0, -1]
            losses.append(-float(logits.double().log_softmax(-1)[ids[place]]))
        found.append(losses)
    return found


@pytest.mark.parametrize(
    ("context", "stride", "batch_size"), [(64, 64, 1), (64, 64, 3), (16, 16, 4), (16, 5, 3)]
)
def test_equals_brute_force(tiny_llama, tokenizer, context, stride, batch_size):
    texts = [Document(f"d{n}", documents(1, first=n)[0].text[: 9 + 11 * n]) for n in range(4)]
    expected = brute_force(tiny_llama, tokenizer, texts, tokens=40, context=context, stride=stride)
    sizes = WindowConfig(context, stride, batch_size)
    found = perplexity(tiny_llama, tokenizer, texts, sizes, tokens=40)
    everything = [loss for losses in expected for loss in losses]
    assert found["value"] == pytest.approx(math.exp(np.mean(everything)), rel=1e-4)
    assert found["tokens"] == len(everything)
    assert found["documents"] == 4
    for entry, text, losses in zip(found["per_document"], texts, expected, strict=True):
        assert entry["name"] == text.name
        assert entry["tokens"] == len(losses)
        assert entry["nll"] == pytest.approx(sum(losses), rel=1e-4)


@pytest.mark.parametrize(("most", "starts"), [(1, [0]), (2, [0, 64]), (3, [0, 32, 80]), (9, None)])
def test_windows_at_equal_distances_from_the_first(tiny_llama, tokenizer, most, starts):
    text = documents(1)[0].text[:120]
    ids = torch.tensor(tokenizer(text)["input_ids"])[None]
    assert 7 * 16 < ids.shape[1] <= 8 * 16
    expected = []
    for start in range(0, ids.shape[1], 16) if starts is None else starts:
        window = ids[:, start : start + 17]
        with torch.no_grad():
            logits = tiny_llama(input_ids=window[:, :-1]).logits[0]
        expected += torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="none")
    sizes = WindowConfig(16, 16, 4)
    found = perplexity(tiny_llama, tokenizer, [Document("d", text)], sizes, most=most)
    assert found["tokens"] == len(expected)
    assert found["per_document"][0]["nll"] == pytest.approx(float(sum(expected)), rel=1e-4)


@pytest.mark.parametrize("count", [10, 22, 100])
def test_the_interval_covers_what_it_says(count):
    """Of documents of unequal lengths whose losses a token differ, in 93 to 97 %."""
    draw = np.random.default_rng(0)
    tokens = np.minimum(np.exp(draw.normal(6.0, 0.5, (2000, count))), 512).round().clip(16)
    spread = 0.2 * draw.normal(size=tokens.shape) + draw.normal(size=tokens.shape) / tokens**0.5
    found = [perplexity_interval(*one) for one in zip((3.0 + spread) * tokens, tokens, strict=True)]
    inside = np.mean([low <= math.exp(3.0) <= high for low, high in found])
    assert 0.93 <= inside <= 0.97


def test_documents_of_one_length_are_student_s():
    nll = np.random.default_rng(0).normal(300, 20, 12)
    expected = stats.ttest_1samp(nll / 100, 0).confidence_interval()
    assert perplexity_interval(nll, np.full(12, 100)) == pytest.approx(tuple(np.exp(expected)))


def test_equal_documents_have_no_spread_and_one_document_no_interval():
    ends = perplexity_interval(np.full(5, 20.0), np.full(5, 10))
    assert ends == pytest.approx((math.exp(2.0), math.exp(2.0)))
    assert perplexity_interval(np.array([20.0]), np.array([10])) == (None, None)


@given(
    length=st.integers(0, 60),
    context=st.integers(1, 20),
    data=st.data(),
)
def test_windows_score_each_token_once_with_enough_context(length, context, data):
    stride = data.draw(st.integers(1, context))
    ids = list(range(100, 100 + length))
    windows = windows_of(ids, 0, context=context, stride=stride)
    assert [t for window in windows for t in window.targets] == ids[1:]
    for window in windows:
        assert len(window.inputs) <= context
        assert list(window.inputs) == ids[window.start : window.start + len(window.inputs)]
        assert window.targets[-1] == window.inputs[-1] + 1
        seen = len(window.inputs) - len(window.targets) + 1
        assert window.start == 0 or seen >= context - stride + 1


def test_limits(tiny_llama, tokenizer):
    texts = [*documents(3), Document("one letter", "a")]
    found = perplexity(tiny_llama, tokenizer, texts, SIZES, tokens=10)
    assert (found["documents"], found["tokens"]) == (3, 27)
    assert [entry["name"] for entry in found["per_document"]] == ["doc-0", "doc-1", "doc-2"]


def test_no_more_of_a_text_is_tokenised_than_its_first_tokens_need(tokenizer):
    text, read = " ".join(f"word{n} {'x' * (n % 50)}" for n in range(20_000)), []

    def counting(part, **options):
        read.append(len(part))
        return tokenizer(part, **options)

    whole = tokenizer(text)["input_ids"]
    for count in (2, 100, 3000, None):
        assert first_tokens(counting, text, count) == whole[:count]
    assert max(read[:-1]) <= 16 * 3000 and read[-1] == len(text)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("stride", 0),
        ("stride", 513),
        ("batch_size", 0),
        ("tokens_per_document", 1),
    ],
)
def test_impossible_sizes_are_refused_before_a_model_is_loaded(option, value):
    with pytest.raises(UserError, match=option):
        PointConfig.parse(compose_tiny(f"eval.perplexity.{option}={value}"))


def test_nothing_to_score(tiny_llama, tokenizer):
    with pytest.raises(UserError, match="no text"):
        perplexity(tiny_llama, tokenizer, [Document("a", "x")], SIZES)
