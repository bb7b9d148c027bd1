"""A wrong value of any option of any group and method is one line, before a model loads."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import Any

import pytest

from runners.errors import UserError
from runners.launching.command_line import prepare
from runners.launching.points import CommandLine
from runners.point_config import CONF, PointConfig
from tests.conftest import compose_tiny

GROUPS = ("method", "model", "data", "budget", "eval", "speed", "tracking", "hardware")
FREE = {
    *("name", "path", "revision", "dir", "text_field", "config_name", "project", "entity", "group"),
    *("data_dir", "results_dir", "cache_dir", "device", "text", "_target_"),
}
"""Options that any text may be in: no other word of text is wrong for their type."""
REAL = {"init_timeout_s", "finish_timeout_s", "checkpoint_seconds", "alpha", "scale"}
"""Whole numbers in the files, but any number will do."""
WRONG: dict[type, tuple[Any, ...]] = {
    bool: ("no", "maybe", 7, None),
    int: ("abc", -7, 1.5, True, [1]),
    float: ("abc", -7.5, True, float("nan"), float("inf"), [0.5]),
    str: (5, True, ["x"], "no_such_choice"),
    list: ("abc", 5, [{"a": 1}]),
    dict: ("abc", 5, [1]),
    type(None): ({"no_such_option": 1}, [{"a": 1}]),
}
"""By the type of an option's value in its file."""

Path = tuple[str, ...]
composed = functools.cache(functools.partial(compose_tiny, config_name="plan"))


def leaves(value: dict[str, Any], path: Path = ()) -> Iterator[tuple[Path, Any]]:
    for key, inner in value.items():
        own = (*path, key)
        if isinstance(inner, dict) and inner:
            yield from leaves(inner, own)
        else:
            yield own, inner


def every_file() -> Iterator[tuple[str, str]]:
    """(group, words that pick a file of it); the options that are in no group last."""
    more = {"model=pretrained": " model.path=a/b", "data=files": " data.dir=x"}
    for group in GROUPS:
        for file in sorted((CONF / group).glob("*.yaml")):
            word = f"{group}={file.stem}"
            yield group, word + more.get(word, "")
    yield "", ""


def wrong_values(path: Path, value: Any) -> list[Any]:
    """Values that no option of this place may have, by the type of its value in the file."""
    wrong = list(WRONG[type(value)])
    if path[-1] in FREE or path[-2:-1] == ("splits",):
        wrong = [v for v in wrong if v != "no_such_choice"]
    if path[-1] in REAL or path[:2] == ("model", "config") or path[0] == "hardware":
        wrong = [v for v in wrong if v not in (1.5, True, None, 7)]
    if path[-1] in ("device_map", "max_memory"):  # places are looked at by base_model.device_map
        wrong = ["abc"] if path[-1] == "max_memory" else [True]
    if path[-1] == "graphs":
        wrong.remove(True)
    return wrong


def with_value(config: dict[str, Any], path: Path, value: Any) -> dict[str, Any]:
    key, *rest = path
    return {**config, key: with_value(config[key], tuple(rest), value) if rest else value}


@pytest.mark.parametrize(("group", "words"), list(every_file()))
def test_a_wrong_value_of_any_option_is_refused(group, words):
    config = composed(*words.split())
    own = {group: config[group]} if group else {k: config[k] for k in config if k not in GROUPS}
    own.pop("experiment", None)
    assert own
    for path, right in leaves(own):
        for value in wrong_values(path, right):
            with pytest.raises(UserError) as caught:
                point = PointConfig.parse(with_value(config, path, value))
                point.method.make(point.sparsity, point.reserve)
            said = str(caught.value)
            assert "\n" not in said and (path[-1] in said or path[0] in said), (path, value)


MISTAKES = [
    ("model.trust_remote_code=no", "model.trust_remote_code must be true or false, not 'no'"),
    ("method=random method.bypass=nope", "method.bypass must be one of"),
    ("method.training.schedule=foo", "method.training.schedule must be one of"),
    ("method.schedule=foo", "(did you mean method.training.schedule?)"),
    ("method.router.start=foo", "method.router.start must be one of"),
    ("method.bypass=skp", "(did you mean skip?)"),
    ("method.train=foo", "method.train must be one of"),
    ("method.lora_lr=abc", "method.lora_lr must be a number"),
    ("method.targets=0.3", "method.targets must be a list in brackets"),
    ("method.rank=abc", "method.rank must be a whole number"),
    ("method.lora=foo", "method.lora must be"),
    ("method.lora={rnk:3}", "(did you mean method.lora.rank?)"),
    ("method.bypas=skip", "unknown option 'method.bypas' (did you mean method.bypass?)"),
    ("+method.bypas=skip", "unknown option 'method.bypas' (did you mean method.bypass?)"),
    ("method.router.sensitivity=foo", "method.router.sensitivity must be true or false"),
    ("method.training.warmup=7", "method.training.warmup must be a number in [0, 1"),
    ("method.targets=[2]", "method.targets must be a list in brackets, each a number in [0, 1)"),
    ("method.rank=-3", "method.rank must be a whole number >= 1"),
    ("merge_lora=foo", "merge_lora must be true or false"),
    ("force=maybe", "force must be true or false, not 'maybe'"),
    ("force=no", "force must be true or false, not 'no'"),
    ("eval.chat_template=no", "eval.chat_template must be true or false"),
    ("eval.batch_size=0", "eval.batch_size must be a whole number >= 1 or one of auto"),
    ("eval.limit=abc", "eval.limit must be a whole number >= 1 or null, not 'abc'"),
    ("eval.limit=-1", "eval.limit must be a whole number >= 1"),
    ("eval.limit=0", "eval.limit must be a whole number >= 1"),
    ("eval.limit=1.5", "eval.limit must be a whole number >= 1"),
    ("eval.tasks=agreement", "eval.tasks=[agreement]"),
    ("eval.perplexity.documents_limit=-1", "documents_limit must be a whole number >= 1"),
    ("+sparcity=0.3", "unknown option 'sparcity' (did you mean sparsity?)"),
    ("sparcity=0.3", "unknown option 'sparcity' (did you mean sparsity?)"),
    ("+foo=1", "unknown option 'foo'"),
    ("seed=-1", "seed must be a whole number >= 0"),
    ("budget.seq_len=0", "budget.seq_len must be a whole number >= 1"),
    ("budget.fit_tokens=abc", "budget.fit_tokens must be a whole number >= 1"),
    ("budget.calibration_tokens=-5", "budget.calibration_tokens must be"),
    ("budget.routers.step=3", "(did you mean budget.routers.steps?)"),
    ("method=infromed", "(did you mean informed?)"),
    ("method._target_=methods.informed.Nope", "cannot be imported"),
    ("method._target_=os.system", "is no subclass of methods.base.Method"),
    ("device=cuda", "device=cuda is not available"),
    ("device=gpu", "device=gpu is not available"),
    ("data.dir=/a(b)", "quoted within quotes"),
    ("results_dir=/dev/null/x", "cannot write results_dir=/dev/null/x"),
    ("results_dir=/proc/x", "cannot write results_dir=/proc/x"),  # also for root
    ("cache_dir=/dev/null/x", "cannot write cache_dir=/dev/null/x"),
]


@pytest.mark.parametrize(("words", "said"), MISTAKES, ids=lambda words: words)
def test_a_mistake_is_one_line_that_names_it(words, said, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError) as caught:
        prepare(["model=tiny", "tracking=off", *words.split()], "sweep")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value) and "+sparcity" not in str(caught.value)


@pytest.mark.parametrize("words", ["method.lora={}", "method.lora={rank:4}", "eval.limit=null"])
def test_what_is_right_passes(words):
    prepare(["model=tiny", "tracking=off", words], "sweep")


def test_numbers_of_a_range_are_those_that_a_user_types():
    words = ["method=random", "model=tiny", "-m"]
    swept = CommandLine([*words, "sparsity=range(0.1,0.8,0.2)"], "sweep").points()
    typed = CommandLine([*words, "sparsity=0.1,0.3,0.5,0.7"], "sweep").points()
    names = [[PointConfig.parse(p).fingerprint for p in points] for points in (swept, typed)]
    assert names[0] == names[1]


def test_home_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["model=pretrained", "model.path=~/m", "results_dir=~/r", "data.dir='~/d'"]
    (config,) = CommandLine(words, "sweep").points()
    point = PointConfig.parse(config)
    found = (point.model.path, point.model.name, point.store.results_dir, point.data.dir)
    assert found == tuple(f"{tmp_path}/{name}" for name in ("m", "m", "r", "d"))


OWN_METHOD = """
from methods.base import Method

class MyNorm(Method):
    def __init__(self, *, sparsity: float, power: int = 2) -> None:
        super().__init__(sparsity=sparsity)
        self.power = power

    def route(self, site, x_BTD, ctx):
        return self.decide(x_BTD.float().norm(dim=-1) ** self.power)
"""


def test_a_method_outside_the_repository(tmp_path, monkeypatch):
    """Named by --config-dir; its options are checked as ours are."""
    (tmp_path / "conf" / "method").mkdir(parents=True)
    yaml = "name: mynorm\n_target_: mynorm.MyNorm\npower: 2\n"
    (tmp_path / "conf" / "method" / "mynorm.yaml").write_text(yaml)
    (tmp_path / "mynorm.py").write_text(OWN_METHOD)
    words = ["--config-dir", str(tmp_path / "conf"), "model=tiny", "tracking=off", "method=mynorm"]
    with pytest.raises(UserError, match=r"_target_=mynorm\.MyNorm cannot be imported"):
        prepare(words, "sweep")
    monkeypatch.syspath_prepend(tmp_path)
    assert prepare([*words, "sparsity=0.3"], "sweep")
    for wrong in ("method.power=abc", "method.power=1.5", "+method.pwer=2"):
        with pytest.raises(UserError, match=r"method\.power"):
            prepare([*words, wrong], "sweep")
    with pytest.raises(UserError, match=r"unknown method 'mynrm' \(did you mean mynorm"):
        prepare([*words[:-1], "method=mynrm"], "sweep")


def test_a_saved_class_outside_the_project_is_not_imported(tmp_path):
    """Unless the user says so: to import it runs its code."""
    settings = {"target": "nowhere.Method", "options": {"sparsity": 0.5}}
    settings["base"] = {
        "name": "t",
        "source": "tiny",
        "path": "llama",
        "seed": 0,
        "weights_sha256": "0",
    }
    (tmp_path / "routed.json").write_text(json.dumps(settings))
    (tmp_path / "routed.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="trust_method=true imports it"):
        prepare([f"saved={tmp_path}", "tracking=off"], "score")
    with pytest.raises(UserError, match=r"_target_=nowhere\.Method"):
        prepare([f"saved={tmp_path}", "tracking=off", "trust_method=true"], "score")
