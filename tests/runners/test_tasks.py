"""Built-in tasks: their items, and lm-eval's scores against log-likelihoods of our own."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from methods.engine.wrap import routed
from runners.corpus import load_documents
from runners.errors import UserError
from runners.harness import HarnessModel
from runners.task_items import CHOICES_OF, GENERATORS, items_folder, write_items
from runners.tasks import TEMPLATES, check_tasks, prepare_tasks, run_tasks
from tests.conftest import documents, token_rows
from tests.runners.toy import toy

TEXT = documents(8, words=120)
NAMES = sorted(GENERATORS)


@pytest.mark.parametrize("name", NAMES)
def test_items_are_deterministic(name, tmp_path):
    paths = [write_items(name, TEXT, 0, tmp_path / folder) for folder in ("a", "b")]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert write_items(name, TEXT, 1, tmp_path / "c").read_bytes() != paths[0].read_bytes()
    items = [json.loads(line) for line in paths[0].read_text().splitlines()]
    assert items == GENERATORS[name](TEXT, 0)


@pytest.mark.parametrize("name", NAMES)
def test_items_have_one_right_answer_at_a_random_place(name):
    items = GENERATORS[name](TEXT, 0)
    count = CHOICES_OF[name]
    places = [0] * count
    for item in items:
        assert len(item["choices"]) == len(set(item["choices"])) == count
        places[item["gold"]] += 1
    share = len(items) / count
    spread = (len(items) * (1 / count) * (1 - 1 / count)) ** 0.5
    assert all(abs(place - share) < 4 * spread for place in places)


@pytest.mark.parametrize("source", ["toy", "sotu"])
def test_continuations_continue_and_distractors_do_not(source):
    texts = TEXT if source == "toy" else load_documents(split="test")
    joined = [" ".join(document.text.split()) for document in texts]
    for item in GENERATORS["continuation_choice"](texts, 0)[:200]:
        context, gold = item["context"], item["gold"]
        assert any(f"{context} {item['choices'][gold]}" in text for text in joined)
        for place, choice in enumerate(item["choices"]):
            assert any(choice in text for text in joined)
            if place != gold:
                assert not any(f"{context} {choice}" in text for text in joined)


def test_facts_are_in_the_context():
    for item in GENERATORS["fact_lookup"]([], 0):
        *facts, asked = item["context"].split(". ")
        person = asked.removeprefix("Therefore ").removesuffix(" lives in")
        homes = dict(fact.split(" lives in ") for fact in facts)
        assert homes[person] == item["choices"][item["gold"]]
        assert sorted(homes.values()) == sorted(item["choices"])


def test_verbs_agree_with_the_subject():
    plural = {"are", "were", "have"}
    for item in GENERATORS["agreement"]([], 0):
        noun = item["context"].split()[1]
        many = noun.endswith("s") or noun in ("children", "women")
        assert (item["choices"][item["gold"]] in plural) == many


def test_too_little_text_is_one_line():
    with pytest.raises(UserError, match="needs 4 test documents, found 3"):
        GENERATORS["continuation_choice"](documents(3), 0)


def test_folder_depends_on_text_and_seed(tmp_path):
    folders = {
        items_folder(tmp_path, text, seed)
        for text in (TEXT, TEXT[:-1], TEXT[::-1])
        for seed in (0, 1)
    }
    assert len(folders) == 6


@pytest.mark.parametrize("name", NAMES)
def test_task_file_points_to_the_items(name, tmp_path):
    folder = prepare_tasks([name], TEXT, 0, tmp_path)
    task = yaml.safe_load((folder / f"{name}.yaml").read_text())
    assert task["task"] == name
    items = task["dataset_kwargs"]["data_files"]["test"]
    assert Path(items).read_text().startswith('{"context"')
    assert (TEMPLATES / f"{name}.yaml").is_file()


def test_only_built_in_names_need_no_index(monkeypatch):
    monkeypatch.setattr("runners.tasks._harness_names", lambda: {"piqa"})
    check_tasks([*NAMES, "piqa"])
    with pytest.raises(UserError, match="unknown task 'nope'"):
        check_tasks(["nope"])


def log_likelihood(model, context, continuation):
    """(sum of log p, greedy) from one unpadded pass of the untouched forward."""
    logits = model(input_ids=torch.tensor([[*context, *continuation]])).logits[0].double()
    rows = logits.log_softmax(-1)[len(context) - 1 : -1]
    total = sum(float(row[token]) for row, token in zip(rows, continuation, strict=True))
    return total, rows.argmax(-1).tolist() == list(continuation)


REQUESTS = [
    (context, end)
    for context in (token_rows(1, n, seed=n)[0].tolist() for n in (3, 9, 14))
    for end in ([5], [7, 8, 9, 10], [7, 8], [5])
] + [([4, 5, 6], [9, 9, 9])] * 2 + [(token_rows(1, 20, seed=8)[0].tolist(), [33, 34])]  # fmt: skip


@pytest.mark.parametrize("batch_size", [1, 4, 32])
@pytest.mark.parametrize("route", [False, True])
def test_scores_equal_own_log_likelihoods(tiny_llama, tokenizer, batch_size, route):
    method = toy(tiny_llama)
    method.threshold.fill_(0.0 if route else float("-inf"))
    with torch.no_grad(), routed(tiny_llama, method):
        harness = HarnessModel(tiny_llama, tokenizer, batch_size=batch_size)
        requests = [(None, context, end) for context, end in REQUESTS]
        found = harness._loglikelihood_tokens(requests)
        expected = [log_likelihood(tiny_llama, context, end) for context, end in REQUESTS]
    assert [score for score, _ in found] == pytest.approx([s for s, _ in expected], abs=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_greedy_is_recognised(tiny_llama, tokenizer):
    context = [5, 6, 7]
    best = int(tiny_llama(input_ids=torch.tensor([context])).logits[0, -1].argmax())
    harness = HarnessModel(tiny_llama, tokenizer, batch_size=4)
    found = harness._loglikelihood_tokens([(None, context, [best]), (None, context, [best - 1])])
    assert [greedy for _, greedy in found] == [True, False]


def test_padding_is_not_counted(tiny_llama, tokenizer):
    """Contexts once, continuations but their last token: that many tokens were read."""
    requests = [(None, [3, 4, 5], [6, 7]), (None, [3, 4, 5], [8]), (None, [9] * 10, [6, 7, 8])]
    with routed(tiny_llama, toy(tiny_llama)) as model:
        HarnessModel(model, tokenizer, batch_size=8)._loglikelihood_tokens(requests)
        assert model.routing.counters.read().tokens == (3 + 1) + (10 + 2)


def test_long_context_is_cut_on_the_left(tiny_llama, tokenizer):
    harness = HarnessModel(tiny_llama, tokenizer, batch_size=2)
    harness._max_length = 12
    context, end = token_rows(1, 30)[0].tolist(), [7, 8, 9]
    found = harness._loglikelihood_tokens([(None, context, end)])
    assert found[0][0] == pytest.approx(log_likelihood(tiny_llama, context[-10:], end)[0], abs=1e-3)
    with pytest.raises(ValueError, match="empty"):
        harness._loglikelihood_tokens([(None, [], end)])


def test_run_tasks_counts_right_answers(tiny_llama, tokenizer, tmp_path):
    name, limit = "fact_lookup", 24
    options = {"limit": limit, "batch_size": 8, "num_fewshot": None, "seed": 0}
    places = {"cache_dir": tmp_path, "documents": TEXT}
    found = run_tasks(tiny_llama, tokenizer, tasks=[name], **options, **places)[name]
    right = 0
    for item in GENERATORS[name](TEXT, 0)[:limit]:
        encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
        start = encode(item["context"])
        scores = [
            log_likelihood(tiny_llama, start, encode(f" {choice}"))[0] for choice in item["choices"]
        ]
        right += scores.index(max(scores)) == item["gold"]
    share = right / limit
    assert found["value"] == pytest.approx(share)
    assert found["stderr"] == pytest.approx((share * (1 - share) / (limit - 1)) ** 0.5)
    assert (found["n"], found["chance"], found["metric"]) == (limit, 0.25, "acc")


def test_a_request_list_may_be_empty(tiny_llama, tokenizer):
    harness = HarnessModel(tiny_llama, tokenizer, batch_size=2)
    assert harness._loglikelihood_tokens([]) == []
    assert harness.loglikelihood([SimpleNamespace(args=("ab", " cd"))], disable_tqdm=True)
