"""lm-eval's model: against log-likelihoods of our own, and against the stock `hf` class."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import lm_eval
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from methods.engine.routed import routed
from runners.base_model.embedded import embedded_model
from runners.evaluation.harness import HarnessModel, _new_tokens
from runners.evaluation.tasks import TaskSet
from runners.point_config import EvalConfig
from tests.conftest import WORDS, eval_config, token_rows
from tests.runners.toy import toy


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
@pytest.mark.parametrize("share", [False, True])
def test_scores_equal_own_log_likelihoods(tiny_llama, tokenizer, batch_size, route, share):
    method = toy(tiny_llama)
    method.threshold.fill_(0.0 if route else float("-inf"))
    with torch.no_grad(), routed(tiny_llama, method):
        harness = HarnessModel(tiny_llama, tokenizer, batch_size=batch_size, share_contexts=share)
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


def test_padding_is_not_counted_in_the_stock_batches(tiny_llama, tokenizer):
    """Two rows: the first two requests differ in their last token alone but for [6]."""
    requests = [(None, [3, 4, 5], [6, 7]), (None, [3, 4, 5], [8]), (None, [9] * 10, [6, 7, 8])]
    with routed(tiny_llama, toy(tiny_llama)) as model:
        harness = HarnessModel(model, tokenizer, batch_size=8, share_contexts=False)
        harness._loglikelihood_tokens(requests)
        assert model.routing.counters.read().tokens == 4 + 3 + 12


def test_long_context_is_cut_on_the_left(tiny_llama, tokenizer):
    harness = HarnessModel(tiny_llama, tokenizer, batch_size=2)
    harness._max_length = 12
    context, end = token_rows(1, 30)[0].tolist(), [7, 8, 9]
    found = harness._loglikelihood_tokens([(None, context, end)])
    assert found[0][0] == pytest.approx(log_likelihood(tiny_llama, context[-10:], end)[0], abs=1e-3)
    with pytest.raises(ValueError, match="empty"):
        harness._loglikelihood_tokens([(None, [], end)])


def test_a_request_list_may_be_empty(tiny_llama, tokenizer):
    harness = HarnessModel(tiny_llama, tokenizer, batch_size=2)
    assert harness._loglikelihood_tokens([]) == []
    assert harness.loglikelihood([SimpleNamespace(args=("ab", " cd"))], disable_tqdm=True)


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def words(index: int, number: int) -> str:
    return " ".join(WORDS[(index * 5 + i * (index + 2)) % len(WORDS)] for i in range(number))


def write_data(folder: Path) -> None:
    """Made-up records in the fields of the hub's data sets."""
    piqa = [
        {"goal": words(i, 6), "sol1": words(i + 1, 3), "sol2": words(i + 2, 5), "label": i % 2}
        for i in range(14)
    ]
    write_lines(folder / "piqa" / "validation.jsonl", piqa)
    for name, question in (("arc_easy", "question"), ("openbookqa", "question_stem")):
        rows = [
            {
                question: words(i, 7),
                "choices": {"text": [words(i + k, k + 1) for k in range(4)], "label": [*"ABCD"]},
                "answerKey": "ABCD"[i % 4],
            }
            for i in range(12)
        ]
        write_lines(folder / name / "train.jsonl", rows)
        write_lines(folder / name / "test.jsonl", rows[::-1])
    pages = [{"page": f" = {words(i, 2)} = \n {words(i, 40 + 9 * i)} "} for i in range(5)]
    write_lines(folder / "wikitext2" / "test.jsonl", pages)
    sums = [{"question": f"{words(i, 4)} {i} plus {i}?", "answer": f"#### {i}"} for i in range(6)]
    write_lines(folder / "gsm8k" / "train.jsonl", sums)
    write_lines(folder / "gsm8k" / "test.jsonl", sums[:3])


SHOTS = {"arc_easy": 2, "gsm8k": 1}


def settings(*tasks: str, folder: Path | str, **changes: object) -> EvalConfig:
    base = {"tasks": list(tasks), "limit": None, "num_fewshot": SHOTS, "data_dir": str(folder)}
    return eval_config(**{**base, **changes})


def stock(model, tokenizer, chosen, task: str, batch_size: int, **options: object) -> dict:
    """The result of lm-eval's own class and its own defaults."""
    return lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, **options),
        tasks=[task],
        num_fewshot=SHOTS.get(task),
        limit=chosen.settings.limit,
        task_manager=chosen.manager,
        bootstrap_iters=0,
    )


def answers(done: dict, task: str) -> list[tuple[float, bool]]:
    return [
        (float(score), str(greedy))
        for sample in done["samples"][task]
        for score, greedy in sample["filtered_resps"]
    ]


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]
)
def test_dense_equals_the_stock_class(tiny_llama, tokenizer, tmp_path, dtype, monkeypatch):
    """Choices with and without examples, rolling and generation; bfloat16 to the bit."""
    write_data(tmp_path / "data")
    model = tiny_llama.to(dtype)
    names = ["piqa", "arc_easy", "openbookqa", "wikitext", "gsm8k"]
    chosen = TaskSet(settings(*names, folder=tmp_path / "data"), [], 0, tmp_path / "cache")
    harness = HarnessModel(model, tokenizer, batch_size=4)
    assert harness.share_contexts == (dtype == torch.float32)
    logged = tmp_path / "log.jsonl"
    for name in names:
        scores = chosen.run(harness, name, logged)
        done = stock(model, tokenizer, chosen, name, 4)
        expected, own = done["results"][name], [*map(json.loads, logged.read_text().splitlines())]
        if name == "wikitext":
            rel = 1e-6 if dtype == torch.float32 else 3e-3
            for metric in ("word_perplexity", "byte_perplexity"):
                nats = math.log(expected[f"{metric},none"])
                assert math.log(scores.entry[metric]) == pytest.approx(nats, rel=rel)
            assert scores.entry["low"] < scores.entry["value"] < scores.entry["high"]
            continue
        for metric, value in scores.entry["metrics"].items():
            assert value == expected[metric], (name, metric)
        if name == "gsm8k":
            texts = [sample["resps"] for sample in done["samples"][name]]
            assert [sample["resps"] for sample in own] == texts
            assert scores.entry["generated_tokens"] > 0 < scores.entry["tokens_per_s"]
            continue
        found = answers({"samples": {name: own}}, name)
        exact = answers(done, name)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in exact]
        tolerance = 1e-3 if dtype == torch.float32 else 0.0
        assert [s for s, _ in found] == pytest.approx([s for s, _ in exact], abs=tolerance, rel=0)


def test_a_chat_template_is_applied(tiny_llama, tokenizer, tmp_path):
    write_data(tmp_path / "data")
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    try:
        options = settings("arc_easy", folder=tmp_path / "data", limit=3, chat_template=True)
        harness = HarnessModel(tiny_llama, tokenizer, batch_size=4)
        TaskSet(options, [], 0, tmp_path / "cache").run(harness, "arc_easy", tmp_path / "log")
    finally:
        tokenizer.chat_template = None
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert len(lines) == 3
    assert all(line["arguments"][0][0].startswith("<user>Question:") for line in lines)


def test_new_tokens_end_with_the_first_end_token():
    rows = torch.tensor([[5, 6, 0, 0], [5, 0, 6, 7], [0, 0, 0, 0]])
    assert _new_tokens(rows, 0) == 3 + 4 + 1


def test_automatic_batch_size_counts_no_trial(tiny_llama, tokenizer, monkeypatch):
    monkeypatch.setattr(HarnessModel, "max_length", 64)
    with routed(tiny_llama, toy(tiny_llama)) as model:
        harness = HarnessModel(model, tokenizer, batch_size="auto", max_batch_size=4)
        found = harness._loglikelihood_tokens([(None, [3, 4, 5], [6, 7]), (None, [3], [8])])
        assert model.routing.counters.read().tokens == 4 + 1
    expected = log_likelihood(tiny_llama, [3, 4, 5], [6, 7])[0]
    assert found[0][0] == pytest.approx(expected, abs=1e-3)


DATA = os.environ.get("ROUTEBENCH_DATA_DIR")


@pytest.mark.slow
@pytest.mark.skipif(DATA is None, reason="ROUTEBENCH_DATA_DIR names no folder")
@pytest.mark.parametrize("name", ["piqa", "arc_easy", "arc_challenge", "openbookqa"])
def test_embedded_model_equals_the_stock_class_on_real_items(name, tmp_path):
    folder = embedded_model()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    options = settings(name, folder=DATA or "", limit=60, num_fewshot={})
    chosen = TaskSet(options, [], 0, tmp_path)
    scores = chosen.run(HarnessModel(model, tokenizer, batch_size=8), name)
    done = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8),
        tasks=[name],
        limit=60,
        task_manager=chosen.manager,
        bootstrap_iters=100,
    )
    assert scores.entry["metrics"]["acc,none"] == done["results"][name]["acc,none"]
    assert scores.entry["value"] == done["results"][name]["acc_norm,none"]
    assert math.isclose(scores.entry["stderr"], done["results"][name]["acc_norm_stderr,none"])
