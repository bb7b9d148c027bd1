"""The verdict against figures worked out by hand: who loses least at a speed-up, and how."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from analysis import verdict
from analysis.cli import Paths, write
from analysis.drawing import style
from analysis.frames import AnalysisError, Store
from tests.analysis.store import stage, write_point
from tests.analysis.test_speedup import case

STATIC = {"budget": "quick", "static": True}


def timed(prefill: float, decode: float | None = None, **how: object) -> dict:
    """The key `speed` of a record."""
    cases = {"prefill": [case("seq", 512, prefill, 2.0, 0.3) | how]}
    if decode is not None:
        memory = {"peak_memory_bytes": {"dense": 200 * 2**20, "routed": 150 * 2**20}}
        memory["cache_bytes"] = {"dense": 8 * 2**20, "routed": 6 * 2**20}
        cases["decode"] = [case("context", 64, decode, 2.0, 0.3) | memory | how]
    return cases


def point(folder, method, sparsity, perplexity, speed=None, **changes):
    """One record; a static one says so."""
    name = f"{method}-{sparsity}-{changes.get('seed', 0)}-{changes.get('variant', '')}"
    more = {"speed": speed} if speed else {}
    identity = {"fingerprint": name, **changes.pop("identity", {"budget": "quick"})}
    write_point(
        folder, method, sparsity, perplexity=perplexity, identity=identity, **more, **changes
    )


def best(store, phase, at_least):
    every = verdict.standings(verdict.rows(Store(store)))
    own = every[(every["phase"] == phase) & (every["at_least"] == at_least)]
    return own.set_index("method") if own["method"].notna().any() else own


def test_a_measured_point_or_one_between_two_neighbours(tmp_path):
    """Log perplexity over log speed-up: halfway in the one is halfway in the other."""
    point(tmp_path, "informed", 0.2, 22.0, timed(1.1, 1.0), stages=[stage("train", 10.0)])
    point(tmp_path, "informed", 0.4, 44.0, timed(1.1 * 1.25**2 / 1.1**2, 1.6))
    point(tmp_path, "greedy", 0.4, 40.0, timed(1.3, 1.4))
    at = best(tmp_path, "prefill", 1.25)
    # 1.25 is the geometric mean of 1.1 and 1.25 ** 2 / 1.1
    assert at.loc["informed", "ratio"] == pytest.approx(math.sqrt(1.1 * 2.2))
    assert at.loc["informed", "how"] == "between 0.2 and 0.4"
    assert at.loc["informed", "speedup"] == 1.25
    assert at.loc["informed", "sparsity_target"] == pytest.approx(0.3)
    assert at.loc["informed", "training_s"] == pytest.approx(5.0)
    assert at.loc["informed", "choice_task accuracy"] == pytest.approx(0.65)
    assert at.loc["greedy", ["ratio", "how", "speedup"]].tolist() == [2.0, "measured", 1.3]
    assert at["place"].to_dict() == {"informed": 1, "greedy": 2}


def test_nothing_is_extrapolated(tmp_path):
    """Neither beyond the fastest point nor before the slowest; a fast point may lose less."""
    point(tmp_path, "informed", 0.2, 30.0, timed(1.3))
    point(tmp_path, "informed", 0.4, 24.0, timed(1.4))
    row = best(tmp_path, "prefill", 1.1).loc["informed"]
    assert row["ratio"] == pytest.approx(1.2)
    assert (row["how"], row["speedup"]) == ("measured", 1.4)
    assert best(tmp_path, "prefill", 1.5)["method"].isna().all()
    assert "| prefill | 1.5 |  | none is as fast |" in text_of(tmp_path)


def text_of(store):
    write(verdict.VIEW, Paths(store, store / "plots"))
    return next((store / "plots").glob("verdict-*.md")).read_text()


def test_seeds_are_averaged_geometrically(tmp_path):
    for seed, (perplexity, speed) in enumerate(((30.0, 1.2), (40.0, 1.5), (60.0, 1.2))):
        point(tmp_path, "informed", 0.4, perplexity, timed(speed), seed=seed)
    row = best(tmp_path, "prefill", 1.25).loc["informed"]
    assert row["speedup"] == pytest.approx((1.2 * 1.5 * 1.2) ** (1 / 3))
    assert row["ratio"] == pytest.approx((30 * 40 * 60) ** (1 / 3) / 20)


def test_the_first_of_each_role_and_neither_oracle_nor_reference(tmp_path):
    point(tmp_path, "informed", 0.4, 40.0, timed(1.3, 1.3))
    point(tmp_path, "greedy", 0.4, 60.0, timed(1.3, 1.3))
    point(tmp_path, "layer_skip", 0.4, 30.0, timed(1.3, 1.3), identity=STATIC)
    bound = {"budget": "quick", "upper_bound": True}
    point(tmp_path, "oracle", 0.4, 21.0, timed(1.3, 1.3), identity=bound)
    point(tmp_path, "channel_sparse", 0.4, 21.0, identity={"budget": "quick", "flops_only": True})
    point(tmp_path, "hero", 0.4, 21.0)
    part = verdict.rows(Store(tmp_path))
    every, readable = verdict.table(part)
    assert "oracle (true error)" not in set(every["method"].dropna())
    first = readable[(readable["speed-up of"] == "decode") & (readable["at least"] == "1.25")]
    assert first["method"].tolist() == ["layer_skip", "informed"]
    assert first["of those"].tolist() == ["all tokens alike", "routes each token"]
    assert first["place"].tolist() == ["1 of 3", "2 of 3"]
    assert first["KV MiB (/ dense)"].tolist() == ["6.0 (0.75)"] * 2
    assert first["peak MiB (/ dense)"].tolist() == ["150.0 (0.75)"] * 2
    assert verdict.remark(part).endswith("channel_sparse, hero.")
    ppl = part[part["measure"] == "perplexity"].set_index("line")
    on_front = ppl.index[ppl["front_prefill"]]
    assert sorted(on_front) == ["dense", "layer_skip"]


def test_only_points_that_were_timed_alike_are_compared(tmp_path, capsys):
    """The way that most were timed; drawn decisions and untrained models are no points of it."""
    point(tmp_path, "informed", 0.3, 30.0, timed(1.3, threads=1))
    point(tmp_path, "informed", 0.4, 40.0, timed(1.5, threads=1))
    point(tmp_path, "greedy", 0.3, 30.0, timed(9.0, threads=8))
    point(tmp_path, "mod", 0.3, 30.0, timed(9.0, decisions="random", threads=1))
    point(tmp_path, "skipgpt", 0.3, 30.0, timed(9.0, decisions="real", trained=False, threads=1))
    part = verdict.rows(Store(tmp_path))
    assert part.loc[part["prefill"].notna(), "line"].unique().tolist() == ["informed", "dense"]
    assert verdict.remark(part).endswith(
        "Not timed so (speed=sweep times them): greedy, mod, skipgpt."
    )
    assert "informed" in text_of(tmp_path) and "| prefill |" in capsys.readouterr().out


def test_the_picture_has_both_speedups_and_flops_of_each_measure(tmp_path):
    for sparsity, speed in ((0.2, 1.2), (0.4, 1.5)):
        point(tmp_path, "informed", sparsity, 25.0 + 20 * sparsity, timed(speed, speed - 0.1))
    with style.paper():
        figure = verdict.VIEW.draw(verdict.rows(Store(tmp_path)), "title")
    labels = [(axes.get_xlabel(), axes.get_ylabel()) for axes in figure.axes]
    assert [x.split(" ")[0] for x, _ in labels] == [
        "",
        "",
        "measured",
        "measured",
        "FLOPs",
        "FLOPs",
    ]
    assert labels[4][1] != labels[5][1] != ""
    handles, names = figure.axes[0].get_legend_handles_labels()
    drawn = dict(zip(names, handles, strict=True))
    assert list(drawn["informed"].lines[0].get_xdata()) == pytest.approx([1.2, 1.5])
    assert list(drawn["front"].get_xdata()) == pytest.approx([1.0, 1.2, 1.5])


def test_a_method_may_lose_less_than_dense(tmp_path):
    """As noise on a small test text has it; dense is then not on the front, and still drawn."""
    point(tmp_path, "informed", 0.2, 19.0, timed(1.2))
    rows = verdict.rows(Store(tmp_path))
    ppl = rows[rows["measure"] == "perplexity"].set_index("line")
    assert ppl["front_prefill"].to_dict() == {"informed": True, "dense": False}
    assert "| informed |" in text_of(tmp_path)


def test_a_store_without_timing_is_one_line(tmp_path):
    point(tmp_path, "informed", 0.3, 30.0)
    with pytest.raises(AnalysisError, match="speed=sweep"):
        write(verdict.VIEW, Paths(tmp_path, tmp_path))


def test_the_csv_has_every_contender_with_its_records(tmp_path):
    point(tmp_path, "informed", 0.3, 30.0, timed(1.3))
    point(tmp_path, "greedy", 0.3, 40.0, timed(1.3))
    text_of(tmp_path)
    found = pd.read_csv(next((tmp_path / "plots").glob("verdict-*.csv")))
    own = found[(found["phase"] == "prefill") & (found["at_least"] == 1.1)]
    assert own["method"].tolist() == ["informed", "greedy"] and own["place"].tolist() == [1, 2]
    assert own["fingerprints"].notna().all()
