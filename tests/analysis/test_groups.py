"""Points are averaged and drawn together by the content of what made them, never by names."""

from __future__ import annotations

import pandas as pd
import pytest

from analysis import kv, layers, pareto, significance, speedup, tradeoff, training_time
from analysis.frames import AnalysisError, Store
from analysis.groups import NO_FIGURE
from runners.point_config import NOT_IN_FINGERPRINT
from tests.analysis.store import stage, write_point
from tests.analysis.test_speedup import case

CONFIG = {
    "method": {"name": "informed", "rank": 64, "seed": 0},
    "data": {"name": "sotu", "dir": None},
    "budget": {"name": "quick", "routers": {"steps": 24}, "calibration_tokens": 4096},
    "eval": {"perplexity": {"documents_limit": None}},
    "objective": "distill",
    "results_dir": "here",
}


def with_config(**sections: dict) -> dict:
    return {
        key: {**value, **sections[key]} if key in sections else value
        for key, value in CONFIG.items()
    }


def put(folder, config=CONFIG, *, value: float = 30.0, **changes) -> None:
    write_point(folder, "informed", 0.5, perplexity=value, config=config, **changes)


def test_only_the_seed_is_averaged(tmp_path):
    """Four points of one seed, of which no two say the same; once they were one row."""
    put(tmp_path, value=30.0)
    put(tmp_path, with_config(budget={"routers": {"steps": 4}}), value=40.0)
    put(tmp_path, with_config(eval={"perplexity": {"documents_limit": 3}}), value=50.0, dense=19.0)
    put(tmp_path, with_config(budget={"calibration_tokens": 1024}), value=60.0)
    for seed, value in ((1, 30.0), (2, 30.0)):  # `method.seed` follows the seed
        put(tmp_path, with_config(method={"seed": seed}), value=value, seed=seed)
    averaged = Store(tmp_path).averaged.query("measure == 'perplexity'").set_index("setting")
    assert averaged["value"].round(6).to_dict() == {
        "tiny · sotu · quick": 30.0,
        "tiny · sotu · quick · budget.routers.steps=4": 40.0,
        "tiny · sotu · quick · eval.perplexity.documents_limit=3": 50.0,
        "tiny · sotu · quick · budget.calibration_tokens=1024": 60.0,
    }
    assert averaged["seeds"].tolist().count(3) == 1 and averaged["seeds"].sum() == 6


def test_a_folder_of_text_is_a_group(tmp_path):
    for place in range(5):
        put(tmp_path, with_config(data={"name": "files", "dir": f"/text/{place}"}), data="files")
    assert sorted(Store(tmp_path).points["setting"]) == [
        f"tiny · files · quick · data.dir=/text/{place}" for place in range(5)
    ]


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        ({"weights_sha256": "a" * 64}, {"weights_sha256": "b" * 64}, "weights_sha256=bbbbbbbb"),
        ({"text_sha256": "a" * 64}, {"text_sha256": "b" * 64}, "text_sha256=bbbbbbbb"),
        ({"packages": {"torch": "2"}}, {"packages": {"torch": "3"}}, "packages.torch=3"),
    ],
)
def test_what_made_the_scores_tells_groups_apart(tmp_path, one, other, said):
    """Also what a later record's identity may say that this code has never heard of."""
    put(tmp_path, identity=one, seed=0)
    put(tmp_path, identity=other, seed=1)
    settings = set(Store(tmp_path).points["setting"])
    assert len(settings) == 2 and any(title.endswith(said) for title in settings)


@pytest.mark.parametrize("own", [{"command": "x"}, {"git": {"commit": "c"}}, {"cpu_count": 3}])
def test_what_changes_no_score_does_not(tmp_path, own):
    put(tmp_path, seed=0)
    put(tmp_path, {**CONFIG, "results_dir": "there", "force": True}, seed=1, identity=own)
    assert Store(tmp_path).averaged["seeds"].tolist() == [2, 2]


def test_options_that_a_variant_does_not_say_are_lines(tmp_path):
    """The default in conf/method changed in between: both variants are empty."""
    put(tmp_path, value=30.0)
    put(tmp_path, with_config(method={"rank": 32}), value=31.0)
    assert set(Store(tmp_path).points["line"]) == {"informed (rank=64)", "informed (rank=32)"}


def test_what_a_method_reserves_is_a_line(tmp_path):
    """In the picture of the others, as the ablation of `reserve` is beside its default."""
    put(tmp_path, {**CONFIG, "reserve": 1})
    put(tmp_path, {**CONFIG, "reserve": 0})
    points = Store(tmp_path).points
    assert points["setting"].nunique() == 1 and points["line"].nunique() == 2


def test_one_seed_twice_is_two_saved_models(tmp_path):
    put(tmp_path, {**CONFIG, "saved": "a", "saved_sha256": "1"})
    put(tmp_path, {**CONFIG, "saved": "b", "saved_sha256": "2"})
    averaged = Store(tmp_path).averaged
    assert averaged["seeds"].tolist() == [1] * 4 and averaged["line"].nunique() == 2


def test_a_dense_model_of_another_text_is_refused_with_both_fingerprints(tmp_path):
    put(tmp_path, seed=0)
    put(tmp_path, seed=1, dense=20.5)
    names = [path.name for path in sorted(tmp_path.iterdir())]
    with pytest.raises(AnalysisError, match=f"20.0000 in {names[0]} and 20.5000 in {names[1]}"):
        Store(tmp_path)


def test_every_csv_carries_the_fingerprints(tmp_path):
    names = set()
    for seed in (0, 1):
        speed = {"prefill": [case("seq", 8, 1.2, 1.4, 0.3)], "decode": []}
        realised = {"per_layer": [{"layer": 0, "attention": 0.1, "mlp": 0.2}]}
        more = {"speed": speed, "realised": realised, "stages": [stage("fit", 1.0 + seed)]}
        path = write_point(
            tmp_path, "informed", 0.5, perplexity=30.0, seed=seed, kv_bytes_ratio=0.5, **more
        )
        row = {"measure": "accuracy", "name": "t", "metric": "acc", "weight": 1.0, "dense": 1.0}
        items = pd.DataFrame([{**row, "item": f"i{i}", "value": i % 2} for i in range(8)])
        items.to_parquet(path / "items.parquet")
        names.add(path.name)
    store = Store(tmp_path)
    for script in (tradeoff, pareto, training_time, speedup, kv, layers, significance):
        found, _ = script.VIEW.table(script.VIEW.rows(store))
        columns = [column for column in ("fingerprint", "fingerprints") if column in found]
        listed = {name for cell in found[columns[0]] for name in cell.split()}
        assert listed == names, script.VIEW.name


def test_what_is_not_in_a_fingerprint_splits_no_picture():
    """Analysis knows no runner, so that its list of such keys is its own."""
    assert NOT_IN_FINGERPRINT <= NO_FIGURE
