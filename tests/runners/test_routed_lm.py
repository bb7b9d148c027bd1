"""lm-eval's command line on a saved routed model, as a user would type it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import lm_eval
import pytest
import torch
import yaml
from lm_eval.models.huggingface import HFLM

from methods.engine.checkpoint import hash_model, save_pretrained
from methods.engine.routed import attach, routed
from methods.engine.routing import routing_of
from methods.random import Random
from runners.base_model.synthetic import byte_tokenizer, tiny_model
from runners.errors import UserError
from runners.evaluation.tasks import TaskSet
from runners.routed_lm import RoutedLM, RoutedOptions, completed
from tests.conftest import ROOT
from tests.runners.evaluation.test_harness import settings, write_data

OPTIONS = {"bypass": "skip"}


@pytest.fixture
def saved(tmp_path):
    """A tiny model's folder, and a routed model of it that executes everything."""
    model, tokenizer = tiny_model(seed=3)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    method = attach(model, Random(sparsity=0.4, **OPTIONS))
    method.threshold.fill_(float("-inf"))
    base = {
        "name": "mine",
        "source": "pretrained",
        "path": str(tmp_path / "base"),
        "revision": None,
        "seed": 0,
        "weights_sha256": hash_model(model),
    }
    options = {"sparsity": 0.4, **OPTIONS}
    return save_pretrained(
        method, tmp_path / "routed", target="methods.random.Random", options=options, base=base
    )


def run(commands, tmp_path, *words, launcher=("-m", "runners.routed_lm")):
    """lm-eval's command line, and the scores that it wrote."""
    out = tmp_path / "out"
    command = [sys.executable, *launcher, *words, "--limit", "9", "--output_path", str(out)]
    command += ["--data_dir", str(tmp_path / "data"), "--log_samples", "--batch_size", "4"]
    cache = {"ROUTEBENCH_CACHE_DIR": str(tmp_path / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=tmp_path, env=commands.environment(**cache), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (written,) = out.rglob("results_*.json")
    assert list(out.rglob("samples_piqa_*.jsonl"))
    return json.loads(written.read_text())["results"]


def stock_scores(tmp_path, *names):
    """Those of lm-eval's `hf` on the base model."""
    chosen = TaskSet(settings(*names, folder=tmp_path / "data"), [], 0, tmp_path / "cache")
    model, _ = tiny_model(seed=3)
    return lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=byte_tokenizer(), batch_size=4),
        tasks=list(names),
        task_manager=chosen.manager,
        limit=9,
        bootstrap_iters=0,
    )["results"]


def test_command_line_equals_the_stock_class(saved, tmp_path, commands):
    """All executed: the scores of `--model hf` on the base model, a task of ours among them."""
    write_data(tmp_path / "data")
    words = ["--model_args", f"pretrained={saved},dtype=float32", "--device", "cuda"]
    found = run(commands, tmp_path, *words, "--tasks", "piqa,agreement")
    expected = stock_scores(tmp_path, "piqa", "agreement")
    for task, metric in (
        ("piqa", "acc,none"),
        ("piqa", "acc_norm,none"),
        ("agreement", "acc,none"),
    ):
        assert found[task][metric] == expected[task][metric]


@pytest.mark.slow  # each process reads all of lm-eval's task files
def test_launched_processes_share_the_items(saved, tmp_path, commands):
    write_data(tmp_path / "data")
    config = str(ROOT / "conf" / "accelerate" / "ddp.yaml")
    launcher = ["-m", "accelerate.commands.launch", "--config_file", config, "-m"]
    words = ["--model_args", f"pretrained={saved},dtype=float32", "--tasks", "piqa", "gsm8k"]
    found = run(commands, tmp_path, *words, launcher=[*launcher, "runners.routed_lm"])
    expected = stock_scores(tmp_path, "piqa", "gsm8k")
    for task in ("piqa", "gsm8k"):
        scores = {name: v for name, v in expected[task].items() if "stderr" not in name}
        assert {name: found[task][name] for name in scores} == scores


def test_words_of_the_command_line(tmp_path, monkeypatch):
    """What is not ours stays as it is; our tasks and those of a data folder become files."""
    monkeypatch.setenv("ROUTEBENCH_CACHE_DIR", str(tmp_path / "cache"))
    assert completed(["ls", "tasks"]) == ["ls", "tasks"]
    assert completed(["--config", "mine.yaml"]) == ["--config", "mine.yaml"]
    plain = ["run", "--model", "hf", "--tasks", "piqa,mine", "--limit", "2"]
    assert completed(plain) == plain
    own = completed(["-t", "agreement", "hellaswag", "-f", "3", "-b", "auto"])
    assert own[:3] == ["--model", "routed", "--tasks"]
    assert own[4:] == ["--num_fewshot", "3", "-b", "auto"]
    file, other = own[3].split(",")
    assert other == "hellaswag" and yaml.safe_load(Path(file).read_text())["task"] == "agreement"
    write_data(tmp_path / "data")
    local = completed(["--tasks", "piqa", "--data_dir", str(tmp_path / "data")])[3]
    assert str(tmp_path / "data") in Path(local).read_text()
    with pytest.raises(UserError, match=r"lacks hellaswag/validation\.jsonl"):
        completed(["--tasks", "hellaswag", "--data_dir", str(tmp_path / "data")])


def test_the_page_of_options_has_each_one():
    page = (ROOT / "docs/options.md").read_text()
    section = page.partition("## A saved model in lm-eval")[2].partition("\n## ")[0]
    keys = re.findall(r"^\| (`.*?`) \|", section, re.MULTILINE)
    listed = [name for key in keys for name in re.findall(r"\w+", key)]
    assert sorted(listed) == sorted(field.name for field in fields(RoutedOptions))


def test_a_class_outside_the_project_is_imported_where_the_user_says_so(
    saved, tmp_path, monkeypatch
):
    code = "from methods.random import Random\nclass Mine(Random):\n    pass\n"
    (tmp_path / "minemethod.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    settings = json.loads((saved / "routed.json").read_text())
    settings["target"] = "minemethod.Mine"
    (saved / "routed.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="trust_method=true imports it"):
        RoutedLM(str(saved), device="cpu")
    assert "minemethod" not in sys.modules
    RoutedLM(str(saved), device="cpu", dtype="float32", trust_method=True)
    assert "minemethod" in sys.modules


def test_a_mistake_is_one_line(tmp_path, commands):
    command = [sys.executable, "-m", "runners.routed_lm", "--model", "routed", "--tasks", "piqa"]
    command += ["--model_args", f"pretrained={tmp_path / 'absent'}"]
    done = subprocess.run(
        command, cwd=tmp_path, env=commands.environment(), capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "holds no saved routed model" in done.stderr.splitlines()[-1]


def test_sparsity_moves_the_threshold(saved, tmp_path):
    (tmp_path / "text").mkdir()
    line = json.dumps({"text": "the people of this union met in peace " * 80})
    (tmp_path / "text" / "calibration.jsonl").write_text(f"{line}\n")
    options = {"calibration_dir": str(tmp_path / "text"), "calibration_seq_len": 64}
    lm = RoutedLM(str(saved), sparsity=0.5, mode="gathered", dtype="float32", **options)
    lm._loglikelihood_tokens([(None, list(range(3, 200)), [5, 6])])
    realised = routing_of(lm.model).counters.read().sparsity()
    assert realised == pytest.approx(0.5, abs=0.05)
    lm._routed.close()
    assert not hasattr(lm.model, "routing")


def test_a_base_of_other_weights_is_refused(saved, tmp_path):
    model, tokenizer = tiny_model(seed=4)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "other")
    options = {"base_model": str(tmp_path / "other"), "dtype": "float32"}
    with pytest.raises(UserError, match=r"was trained on weights .*check_weights=false") as said:
        RoutedLM(str(saved), **options)
    assert "\n" not in str(said.value)
    RoutedLM(str(saved), **options, check_weights=False)._routed.close()


def test_refused(saved):
    with pytest.raises(UserError, match="mode must be one of masked, gathered"):
        RoutedLM(str(saved), mode="fast")
    with pytest.raises(UserError, match="sparsity"):
        RoutedLM(str(saved), sparsity=1.5)
    with pytest.raises(UserError, match=r"no such|cannot load"):
        RoutedLM(str(saved), base_model="./absent")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("sparcity", 0.7),
        ("add_bos_token", True),
        ("peft", "folder"),
        ("revision", "main"),
        ("load_in_8bit", True),
        ("trust_remote_code", "no"),
        ("calibration_tokens", -1),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(saved, option, value):
    with pytest.raises(UserError, match=option) as caught:
        RoutedLM(str(saved), **{option: value})
    assert "\n" not in str(caught.value)


def test_sharding_is_refused(saved, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="launch it without FSDP"):
        RoutedLM(str(saved))


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_without_cuda_the_default_device_of_lm_eval_is_the_cpu(saved):
    lm = RoutedLM(str(saved), device="cuda:0", dtype="float32")
    assert lm.device.type == "cpu"
    lm._routed.close()


def test_a_response_cache_serves_one_model_only(saved, tmp_path):
    """Another threshold, mode, base or precision, or another class's file, is refused."""
    write_data(tmp_path / "data")
    chosen = TaskSet(settings("piqa", folder=tmp_path / "data"), [], 0, tmp_path / "cache")

    def score(cache, model):
        options = {"tasks": ["piqa"], "task_manager": chosen.manager, "bootstrap_iters": 0}
        try:
            done = lm_eval.simple_evaluate(model=model, use_cache=str(tmp_path / cache), **options)
        finally:
            if isinstance(model, RoutedLM):
                model._routed.close()
        return done["results"]["piqa"]

    def make(**options):
        text = {"calibration_tokens": 512, "calibration_seq_len": 64}
        return RoutedLM(str(saved), **{"dtype": "float32", **text, **options})

    first = score("answers", make())
    assert score("answers", make(batch_size=4)) == first
    half = {"dtype": "bfloat16", "check_weights": False}
    for other in ({"mode": "masked"}, half, {"sparsity": 0.5}):
        with pytest.raises(UserError, match="another model's answers"):
            score("answers", make(**other))
    model, tokenizer = tiny_model(seed=3)
    score("stock", HFLM(pretrained=model, tokenizer=tokenizer))
    with pytest.raises(UserError, match="another model's answers"):
        score("stock", make())


def test_usable_wherever_a_routed_model_is(saved):
    lm = RoutedLM(str(saved), dtype="float32")
    with pytest.raises(ValueError, match="already routed"), routed(lm.model, Random(sparsity=0.1)):
        pass
    lm._routed.close()
