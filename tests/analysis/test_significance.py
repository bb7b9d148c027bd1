"""Paired tests against closed forms and other implementations."""

from __future__ import annotations

import json
from math import comb

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis import significance
from analysis.bands import bands, with_bands
from analysis.cli import AnalysisError, Paths
from analysis.frames import items, measures, over_seeds, read_store
from analysis.power import (
    answer,
    independent_disagreement,
    items_needed,
    parse,
    seeds_needed,
    t_power,
)
from analysis.significance import bootstrap, bootstrap_p, compare, holm, main, mcnemar
from analysis.tradeoff import draw
from tests.analysis.store import write_point


def test_mcnemar_is_the_binomial_tail():
    a = np.array([1] * 9 + [0] * 3 + [1] * 20 + [0] * 5)
    b = np.array([0] * 9 + [1] * 3 + [1] * 20 + [0] * 5)
    tail = sum(comb(12, k) for k in range(4)) / 2**12
    assert mcnemar(a, b) == pytest.approx(2 * tail)
    assert mcnemar(a, b) == mcnemar(b, a)
    assert mcnemar(a, a) == 1.0


def test_bootstrap_agrees_with_the_normal_interval():
    values = np.random.default_rng(1).normal(0.1, 1.0, 800)
    low, high = bootstrap(values, np.ones(800))
    half = 1.96 * values.std(ddof=1) / 800**0.5
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.01)
    expected = stats.ttest_1samp(values, 0.0).pvalue
    assert bootstrap_p(values, np.ones(800)) == pytest.approx(expected, rel=0.25, abs=2e-3)


def test_holm():
    assert holm(np.array([0.04, 0.01, 0.03])) == pytest.approx([0.06, 0.03, 0.06])
    assert holm(np.array([0.9, 0.8])) == pytest.approx([1.0, 1.0])


def point(folder, method: str, values, dense, nll, seed: int = 0) -> None:
    write_point(folder, method, 0.3, perplexity=30.0, seed=seed)
    name = f"{method}-0.3-{seed}-"
    task = {"measure": "accuracy", "name": "piqa", "metric": "acc", "weight": 1.0}
    text = {"measure": "perplexity", "name": "sotu", "metric": "nll", "weight": 100.0}
    rows = [
        {**task, "item": f"i{i}", "value": v, "dense": d}
        for i, (v, d) in enumerate(zip(values, dense, strict=True))
    ]
    rows += [{**text, "item": f"d{i}", "value": v, "dense": 300.0 + i} for i, v in enumerate(nll)]
    pd.DataFrame(rows).to_parquet(folder / name / "items.parquet")


@pytest.fixture
def store(tmp_path):
    draw = np.random.default_rng(0)
    dense = draw.integers(0, 2, 300).astype(float)
    better = np.where(draw.random(300) < 0.1, 1 - dense, dense)
    worse = np.where(draw.random(300) < 0.4, 0.0, dense)
    nll = 320 + draw.normal(0, 5, 20)
    point(tmp_path, "informed", better, dense, nll)
    point(tmp_path, "greedy", worse, dense, nll + 30 + draw.normal(0, 5, 20))
    return tmp_path


def test_compare(store):
    table = compare(items(store)).set_index(["name", "a", "b"])
    assert len(table) == 6
    row = table.loc[("piqa", "greedy", "informed")]
    frame = items(store)
    piqa = frame[frame.name == "piqa"].pivot(index="item", columns="method", values="value")
    assert row.p == pytest.approx(mcnemar(piqa.greedy.to_numpy(), piqa.informed.to_numpy()))
    assert row.difference == pytest.approx((piqa.greedy - piqa.informed).mean())
    assert row.low < row.difference < row.high < 0
    assert (row.test, row.n) == ("mcnemar", 300)
    text = table.loc[("sotu", "greedy", "informed")]
    assert text.difference == pytest.approx(text.a_value / text.b_value)
    assert 1 < text.low < text.difference < text.high
    assert text.p_holm < 0.01
    assert ("piqa", "dense", "informed") in table.index


def test_several_seeds_are_averaged_per_item(store):
    frame = items(store)
    values = frame[(frame.name == "piqa") & (frame.method == "informed")].value.to_numpy()
    dense = frame[(frame.name == "piqa") & (frame.method == "informed")].dense.to_numpy()
    point(store, "informed", 1 - values, dense, np.full(20, 320.0), seed=1)
    row = compare(items(store)).set_index(["name", "a", "b"]).loc[("piqa", "greedy", "informed")]
    assert row.b_value == pytest.approx(0.5)
    assert row.test == "bootstrap"


def test_main_writes_tables(store):
    main(Paths(store, store / "plots"))
    written = {path.name for path in (store / "plots").iterdir()}
    assert written == {f"significance-tiny-sotu-quick.{ending}" for ending in ("csv", "md", "tex")}
    text = (store / "plots" / "significance-tiny-sotu-quick.md").read_text()
    assert "mcnemar" in text and "*" in text


def test_bands_are_bootstrap_intervals_of_the_items(store):
    found = bands(store).set_index(["method", "name"])
    frame = items(store)
    own = frame[(frame.method == "greedy") & (frame.name == "piqa")].value
    half = 1.96 * own.std() / len(own) ** 0.5
    row = found.loc[("greedy", "piqa")]
    assert (row.band_low, row.band_high) == pytest.approx(
        (own.mean() - half, own.mean() + half), abs=0.01
    )
    text = found.loc[("informed", "sotu")]
    nll = frame[(frame.method == "informed") & (frame.name == "sotu")].value
    assert text.band_low < np.exp(nll.sum() / 2000) < text.band_high
    averaged = over_seeds(measures(read_store(store)))
    assert len(with_bands(averaged, store)) == len(averaged)


def test_curves_carry_bands(store):
    for target, seed in ((0.5, 0), (0.7, 0)):
        write_point(store, "informed", target, perplexity=40.0, seed=seed)
    averaged = with_bands(over_seeds(measures(read_store(store))), store)
    figure = draw(averaged, "title")
    assert any(axes.collections for axes in figure.axes)


def test_no_items_is_one_line(tmp_path):
    write_point(tmp_path, "informed", 0.3, perplexity=30.0)
    with pytest.raises(AnalysisError, match=r"no point of .* has an items\.parquet"):
        items(tmp_path)


def test_items_needed_have_the_power_that_was_asked_for():
    """Simulated: McNemar's test at the computed n rejects in 80 % of draws."""
    psi, difference = 0.2, 0.08
    n = items_needed(difference, psi)
    draw = np.random.default_rng(0)
    only_a = (psi + difference) / 2
    counts = draw.multinomial(n, [only_a, psi - only_a, 1 - psi], size=4000)
    z = (counts[:, 0] - counts[:, 1]) / np.sqrt(counts[:, 0] + counts[:, 1])
    assert (np.abs(z) > 1.96).mean() == pytest.approx(0.8, abs=0.03)


def test_seeds_needed_have_the_power_that_was_asked_for():
    n = seeds_needed(1.0, 0.8)
    draw = np.random.default_rng(0)
    a, b = draw.normal(1.0, 0.8, (4000, n)), draw.normal(0.0, 0.8, (4000, n))
    power = (stats.ttest_ind(a, b, axis=1).pvalue < 0.05).mean()
    assert power == pytest.approx(t_power(1.0, 0.8, n), abs=0.03)
    assert power > 0.78 and t_power(1.0, 0.8, n - 1) < 0.8


def test_power_command():
    assert (
        answer(parse(["difference=1.0", "std=0.8"])) == f"{seeds_needed(1.0, 0.8)} seeds per method"
    )
    share = independent_disagreement(0.6, 0.02)
    assert str(items_needed(0.02, share)) in answer(parse(["difference=0.02", "accuracy=0.6"]))
    for words in (["x=1"], ["difference=a"], ["difference=0.1"], ["difference=0.5", "accuracy=1"]):
        with pytest.raises(AnalysisError):
            answer(parse([*words, "disagree=0.1"] if words[0] == "difference=0.5" else words))


def test_the_table_is_json_free_of_objects(store):
    json.dumps(significance.compare(items(store)).to_dict(orient="list"))
