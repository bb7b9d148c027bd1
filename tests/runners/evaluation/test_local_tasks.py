"""Stock tasks from a folder: what is overridden, what is missing, what stays."""

from __future__ import annotations

import pytest
from lm_eval.tasks import TaskManager

from runners.errors import UserError
from runners.evaluation.stock_tasks import (
    missing_files,
    stock,
    stock_config,
    stock_task,
    task_file,
)
from runners.evaluation.tasks import TaskSet
from runners.evaluation.texts import load_text, present_texts
from runners.launching.check import check_evaluation
from runners.point_config import EvalConfig, PointConfig
from tests.conftest import compose_tiny
from tests.runners.evaluation.test_harness import settings, write_data, write_lines

DATA_KEYS = {"dataset_path", "dataset_name", "dataset_kwargs", "metadata", "include", "tag"}


@pytest.fixture
def data(tmp_path):
    write_data(tmp_path / "data")
    return tmp_path / "data"


def evaluation(data, *words: str) -> EvalConfig:
    return PointConfig.parse(compose_tiny(f"eval.data_dir={data}", *words)).eval


@pytest.mark.parametrize("name", ["piqa", "arc_easy", "openbookqa", "wikitext", "gsm8k"])
def test_only_paths_and_absent_splits_differ_from_the_stock_task(name, data, tmp_path):
    chosen = TaskSet(settings(name, folder=data, num_fewshot={}), [], 0, tmp_path / "cache")
    task = chosen.manager.load([name])["tasks"][name]
    original = stock_config(stock().tasks[name])
    own = task.dump_config()
    for key in set(original) - DATA_KEYS:
        if key.endswith("_split") and own.get(key) is None:
            assert not (data / stock_task(name, None).folder / f"{original[key]}.jsonl").is_file()
        elif not str(original[key]).startswith("<") and not callable(own[key]):
            assert str(own[key]) == str(original[key]) or key.startswith(("doc_to", "process")), key
    assert task.eval_docs[0] is not None


def test_everything_that_is_missing_is_listed(data):
    tasks = "eval.tasks=[piqa,boolq,arc_easy,hellaswag]"
    with pytest.raises(UserError) as caught:
        check_evaluation(evaluation(data, tasks, "eval.texts=[wikitext2,ptb]"))
    text = str(caught.value)
    assert "\n" not in text
    assert "lacks boolq/validation.jsonl, hellaswag/validation.jsonl:" in text
    assert "piqa" not in text and "arc_easy" not in text and "ptb" not in text


def test_examples_are_never_drawn_from_the_scored_split(data):
    assert missing_files(["piqa"], data, {}) == []
    (lacking,) = missing_files(["piqa"], data, {"piqa": 5})
    assert lacking.startswith("piqa/train.jsonl (examples of the 5-shot prompt")
    with pytest.raises(UserError, match=r"lacks piqa/train\.jsonl"):
        task_file("piqa", data, 5, data)
    with pytest.raises(UserError, match=r"piqa/train\.jsonl"):
        check_evaluation(evaluation(data, "eval.tasks=[piqa]", "++eval.num_fewshot.piqa=5"))
    assert missing_files(["gsm8k"], data, {}) == []
    (data / "gsm8k" / "train.jsonl").unlink()
    assert "5-shot" in missing_files(["gsm8k"], data, {})[0]
    assert missing_files(["gsm8k"], data, {"gsm8k": 0}) == []


def test_examples_come_from_the_train_file(data, tmp_path):
    rows = [
        {
            "question": f"train-only-{i}",
            "choices": {"text": [*"wxyz"], "label": [*"ABCD"]},
            "answerKey": "A",
        }
        for i in range(4)
    ]
    write_lines(data / "arc_easy" / "train.jsonl", rows)
    chosen = TaskSet(settings("arc_easy", folder=data), [], 0, tmp_path / "cache")
    task = chosen.manager.load(["arc_easy"])["tasks"]["arc_easy"]
    task.set_config("num_fewshot", 3)
    task.set_fewshot_seed(1234)
    text = task.fewshot_context(task.eval_docs[0], 3)
    assert str(text).count("train-only-") == 3


def test_a_group_is_not_served(data):
    with pytest.raises(UserError, match="single lm-eval tasks, not 'mmlu'"):
        check_evaluation(evaluation(data, "eval.tasks=[mmlu]"))


def test_no_folder_is_one_line(tmp_path):
    with pytest.raises(UserError, match="absent is not a folder"):
        check_evaluation(evaluation(tmp_path / "absent"))


def test_texts(data):
    assert present_texts(["wikitext2", "ptb"], data) == ["wikitext2"]
    assert len(load_text("wikitext2", data)) == 5
    write_lines(data / "ptb" / "test.jsonl", [{"sentence": "a b"}, {"text": "c d"}])
    assert [document.text for document in load_text("ptb", data)] == ["a b", "c d"]
    with pytest.raises(UserError, match="known: c4, ptb, wikitext2"):
        load_text("wikitext3", data)


def test_names_are_those_of_the_index():
    """Spot check against lm-eval's own parser; the whole comparison is slow."""
    assert {"mmlu", "ai2_arc", "mmlu_stem_tasks"} <= stock().collections
    for name in ("piqa", "boolq", "winogrande", "mmlu_anatomy", "gsm8k"):
        assert stock_config(stock().tasks[name])["task"] == name


@pytest.mark.slow
def test_every_name_of_the_index_is_found():
    index = TaskManager()
    known = {*stock().tasks, *stock().collections}
    assert set(index.all_tasks) - known == set()
