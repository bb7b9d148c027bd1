"""Stage keys of a whole recipe, on the real configs: what is shared and what is made anew."""

from __future__ import annotations

import json

import pytest
import torch

from runners.point import build, merge_dense, train
from runners.point_config import PointConfig
from runners.store.run_folder import RunFolder
from runners.tracking.base import Safe


@pytest.fixture
def trained(tiny_config, tmp_path):
    """Trains a point: (point, {stage: was cached})."""
    count = iter(range(100))

    def run(*overrides, change=lambda config: None):
        config = tiny_config("method=informed", "method.rank=4", "sparsity=0.3", *overrides)
        change(config)
        folder = RunFolder(tmp_path / f"run{next(count)}")
        folder.path.mkdir()
        point = PointConfig.parse(config)
        built = build(point)
        stages = train(point, built, folder, Safe(None)).stages
        return built, {report["name"]: report["cached"] for report in stages}

    return run


def states_equal(a, b):
    pairs = zip(a.method.state_dict().values(), b.method.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def test_a_repeated_recipe_comes_from_the_cache_and_is_the_same(trained, tmp_path):
    first, cached = trained()
    assert not any(cached.values())
    assert "calibrate" in cached
    again, cached = trained()
    assert all(cached.values())
    assert states_equal(first, again)
    events = [json.loads(s) for s in (tmp_path / "run0" / "log.jsonl").read_text().splitlines()]
    stages = [event["name"] for event in events if event["event"] == "stage"]
    assert stages == list(cached)
    assert {"step", "loss", "stage", "unix_time_s"} <= next(
        set(event) for event in events if event["event"] == "step"
    )


def test_another_target_calibrates_only(trained):
    trained()
    point, cached = trained("sparsity=0.6")
    assert [name for name, hit in cached.items() if not hit] == ["calibrate"]
    elsewhere = lambda config: config.update(cache_dir=config["cache_dir"] + "2")  # noqa: E731
    fresh, _ = trained("sparsity=0.6", change=elsewhere)
    assert states_equal(point, fresh)


@pytest.mark.parametrize("option", ["tracking.backend=off", "force=true", "results_dir=else"])
def test_paths_and_tracking_share_products(trained, option):
    trained()
    assert all(trained(option)[1].values())


@pytest.mark.parametrize(
    "option",
    [
        "seed=1",
        "method.rank=5",
        "method.training.lr=0.0077",
        pytest.param("budget.fit_tokens=480", marks=pytest.mark.slow),
        pytest.param("objective=lm", marks=pytest.mark.slow),
        pytest.param("model.path=qwen2", marks=pytest.mark.slow),
        pytest.param("dtype=bfloat16", marks=pytest.mark.slow),
        pytest.param("data.documents_limit=40", marks=pytest.mark.slow),
    ],
)
def test_what_determines_a_product_makes_it_anew(trained, option):
    trained()
    word = f"+{option}" if "documents_limit" in option else option
    assert not any(trained(word)[1].values())


def test_code_of_a_stage_makes_it_anew(trained, monkeypatch):
    trained()
    monkeypatch.setattr("runners.point.stage_version", lambda *method: "another")
    assert not any(trained()[1].values())


def test_documents_change_products(trained, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "test", "calibration"):
        lines = [json.dumps({"text": f"{split} {i} " + "words of text " * 60}) for i in range(6)]
        (data / f"{split}.jsonl").write_text("\n".join(lines))
    words = ("data=files", f"data.dir={data}")
    trained(*words)
    assert all(trained(*words)[1].values())
    whole = (data / "train.jsonl").read_text()
    (data / "train.jsonl").write_text(whole.replace("train 5", "train 7"))
    assert not any(trained(*words)[1].values())


def test_a_scaled_budget_takes_more_steps_and_reads_more_text(trained, tiny_config):
    plain, longer = (PointConfig.parse(tiny_config(*w)) for w in ((), ("budget.scale=4",)))
    assert longer.budget.routers.steps == 4 * plain.budget.routers.steps == 12
    assert longer.budget.fit_tokens == 4 * plain.budget.fit_tokens
    assert longer.budget.calibration_tokens == plain.budget.calibration_tokens
    assert longer.fingerprint != plain.fingerprint
    alike = PointConfig.parse(tiny_config("budget.scale=4", "budget.tokens=5000"))
    assert alike.budget.tokens == 20000 and longer.budget.tokens is None
    trained()
    point, cached = trained("budget.scale=2")
    assert point.budget.lora.steps == 6 and len(point.probe.text.train) == 32
    assert not any(cached.values())


def test_record_has_the_dense_value_beside_each():
    entry = {"value": 3.0, "low": 2.0, "high": 4.0}
    score = {"value": 0.5, "stderr": 0.1, "n": 9}
    score["margin"] = -1.5
    beside = {"value": 0.7, "stderr": 0.2, "margin": -0.5}
    dense = {"perplexity": {"t": {"value": 2.5}}, "accuracy": {"q": beside}}
    record = merge_dense({"perplexity": {"t": entry}, "accuracy": {"q": score}, "other": 1}, dense)
    assert record["perplexity"] == {"t": {**entry, "dense": 2.5}}
    dense_figures = {"dense": 0.7, "dense_stderr": 0.2, "dense_margin": -0.5}
    assert record["accuracy"] == {"q": {**score, **dense_figures}}
    assert record["other"] == 1
