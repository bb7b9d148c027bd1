"""Mistakes in a config end in one line that says what is allowed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from runners.errors import UserError
from runners.launching.check import check_point
from runners.point_config import CONF, PointConfig, resolve
from tests.conftest import SHRUNK, compose_tiny


def test_a_user_error_is_a_value_error():
    assert issubclass(UserError, ValueError)


@pytest.mark.parametrize("method", ["dense", "random", "greedy", "informed"])
def test_shipped_configs_pass(method):
    check_point(compose_tiny(f"method={method}"))


@pytest.mark.parametrize("value", [0, 0.0, 0.5, 0.999])
def test_sparsity_accepted(value):
    check_point({**compose_tiny("method=random"), "sparsity": value})


@pytest.mark.parametrize(
    "value", [1, 1.0, 1.2, -0.1, float("nan"), float("inf"), "0.5", None, True, [0.5]]
)
def test_sparsity_refused(value):
    with pytest.raises(UserError, match=r"sparsity must be a number in \[0, 1\)"):
        check_point({**compose_tiny("method=random"), "sparsity": value})


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("objective", "mse", "one of lm, distill"),
        ("mode", "fastest", "masked"),
        ("dtype", "int8", "bfloat16"),
        ("seed", "one", "whole number"),
        ("seed", 0.5, "whole number"),
    ],
)
def test_choice_refused(key, value, named):
    config = compose_tiny()
    config[key] = value
    with pytest.raises(UserError, match=named) as caught:
        check_point(config)
    assert key in str(caught.value)
    assert repr(value) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stage", ["forecasters", "routers"])
@pytest.mark.parametrize("key", ["steps", "batch_size", "seq_len", "accumulate"])
@pytest.mark.parametrize("value", [0, -1, 1.5, None])
def test_budget_refused(stage, key, value):
    config = compose_tiny()
    config["budget"][stage][key] = value
    with pytest.raises(UserError, match=rf"budget\.{stage}\.{key} must be a whole number >= 1"):
        check_point(config)


def test_data_folder_must_exist(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a text of more than thirty-two bytes"}\n' * 3)
    config = compose_tiny("data=files", f"data.dir={tmp_path}")
    check_point(config)
    config["data"]["dir"] = str(tmp_path / "absent")
    with pytest.raises(UserError, match="absent is not a folder"):
        check_point(config)


def local_model(folder: Path, text: str | None) -> dict[str, str]:
    folder.mkdir()
    if text is not None:
        (folder / "config.json").write_text(text)
    return {"source": "pretrained", "path": str(folder), "name": "local", "revision": "main"}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (None, "no readable config.json"),
        ("{not json", "no readable config.json"),
        (json.dumps({"model_type": "gpt2"}), "gpt2"),
        (json.dumps({}), "None"),
    ],
)
def test_local_model_refused(tmp_path, text, complaint):
    config = compose_tiny()
    config["model"] = local_model(tmp_path / "model", text)
    with pytest.raises(UserError, match=complaint):
        check_point(config)


def test_local_model_accepted_and_hub_id_not_looked_for(tmp_path):
    config = compose_tiny()
    config["model"] = local_model(tmp_path / "model", json.dumps({"model_type": "llama"}))
    check_point(config)
    config["model"]["path"] = "owner/name"
    check_point(config)


def test_unknown_task_is_named():
    config = compose_tiny()
    config["eval"]["tasks"] = ["continuation_choice", "no_such_task"]
    with pytest.raises(UserError, match=r"unknown task 'no_such_task'.*continuation_choice"):
        check_point(config)


def saved_config(saved: Path, sparsity: float | None = None) -> dict:
    return {**compose_score(), "saved": str(saved), "sparsity": sparsity}


def test_saved_folder_needs_both_files(tmp_path):
    with pytest.raises(UserError, match=r"routed\.json, routed\.safetensors"):
        check_point(saved_config(tmp_path))
    (tmp_path / "routed.json").write_text("{}")
    with pytest.raises(UserError, match=r"\(routed\.safetensors\)"):
        check_point(saved_config(tmp_path))
    (tmp_path / "routed.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"\(routed\.json\)"):
        check_point(saved_config(tmp_path))
    base = {"name": "t", "source": "tiny", "path": "llama", "revision": None, "seed": 0}
    settings = {"target": "methods.random.Random", "options": {"sparsity": 0.5, "seed": 0}}
    settings["base"] = {**base, "weights_sha256": "0"}
    (tmp_path / "routed.json").write_text(json.dumps(settings))
    check_point(saved_config(tmp_path))
    with pytest.raises(UserError, match="sparsity"):
        check_point(saved_config(tmp_path, sparsity=1.0))


@pytest.mark.parametrize("said, read", [({"reserve": 2}, 2), ({}, 0)])
def test_a_saved_model_reserves_what_it_was_trained_with(said, read, tmp_path):
    """A folder that does not say is of a model that reserved nothing."""
    base = {"name": "t", "source": "tiny", "path": "llama", "revision": None, "seed": 0}
    settings = {"target": "methods.random.Random", "options": {"sparsity": 0.5, "seed": 0}}
    settings |= {"base": {**base, "weights_sha256": "0"}, **said}
    (tmp_path / "routed.json").write_text(json.dumps(settings))
    (tmp_path / "routed.safetensors").write_bytes(b"")
    assert PointConfig.parse(saved_config(tmp_path)).reserve == read


def compose_score() -> dict:
    words = [word for word in SHRUNK if not word.startswith("model=")]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("score", overrides=[*words, "tracking=off", "saved=nowhere"])
    return resolve(cfg)
