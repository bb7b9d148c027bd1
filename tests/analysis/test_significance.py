"""Paired tests against closed forms, other implementations and simulation."""

from __future__ import annotations

import itertools
import json
from math import comb

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.cli import Paths, write
from analysis.frames import AnalysisError, Store
from analysis.intervals import DRAWS, mcnemar, perplexity_ratio
from analysis.significance import (
    VIEW,
    compare,
    holm,
    items_needed,
    mcnemar_power,
    paired,
)
from tests.analysis.store import write_point
from tests.conftest import ROOT

SPREADS = (0.03, 0.08, 0.3)
"""Between seeds, in nats; `informed`'s own is 0.08 at 0.25."""


def test_mcnemar_is_the_binomial_tail():
    a = np.array([1] * 9 + [0] * 3 + [1] * 20 + [0] * 5)
    b = np.array([0] * 9 + [1] * 3 + [1] * 20 + [0] * 5)
    tail = sum(comb(12, k) for k in range(4)) / 2**12
    assert mcnemar(a, b) == pytest.approx(2 * tail)
    assert mcnemar(a, b) == mcnemar(b, a)
    assert mcnemar(a, a) == 1.0


def test_one_seed_is_the_paired_t_test():
    draw = np.random.default_rng(1)
    a, b = draw.normal(0.1, 1.0, (2, 80, 1))
    *_, difference, half, p = paired(a, b, np.ones(80))
    expected = stats.ttest_rel(a[:, 0], b[:, 0])
    assert float(p) == pytest.approx(expected.pvalue)
    interval = expected.confidence_interval()
    assert (difference - half, difference + half) == pytest.approx(tuple(interval))


def test_without_differences_between_items_it_is_welch_s_test():
    draw = np.random.default_rng(2)
    a, b = draw.normal(0.0, 1.0, (1, 5)), draw.normal(0.5, 3.0, (1, 4))
    *_, p = paired(a.repeat(9, axis=0), b.repeat(9, axis=0), np.ones(9))
    assert float(p) == pytest.approx(stats.ttest_ind(a[0], b[0], equal_var=False).pvalue)


def test_equal_is_no_difference_and_a_fixed_one_is_certain():
    same = np.ones((10, 3))
    assert float(paired(same, same, np.ones(10))[-1]) == 1.0
    assert float(paired(same + 1, same, np.ones(10))[-1]) < 1e-6


def recipes(draw, shape, seeds: int, spread: float, documents: int = 22, own: float = 0.05):
    """Nats of one recipe, [*shape, documents, seeds]: no two of them differ in the mean."""
    of_seeds = draw.normal(0, spread, (*shape, 1, seeds))
    of_documents = draw.normal(0, own, (*shape, documents, 1))
    return of_seeds + of_documents + draw.normal(0, 0.02, (*shape, documents, seeds))


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("other", ["alike", "of one value", "dense"])
def test_equal_recipes_are_told_apart_in_six_percent_at_most(spread, seeds, other):
    draw = np.random.default_rng(0)
    a = recipes(draw, (4000,), seeds, spread)
    b = recipes(draw, (4000,), 1 if other == "dense" else seeds, spread if other == "alike" else 0)
    *_, half, p = paired(a, b, np.ones(22))
    assert (p < 0.05).mean() <= 0.06
    assert half.min() > 0


def test_a_difference_is_still_seen():
    """Twice the spread between three seeds in nearly half of the cases, between five in most."""
    draw = np.random.default_rng(0)
    power = []
    for seeds in (3, 5):
        a, b = (recipes(draw, (2000,), seeds, 0.08) + shift for shift in (0.16, 0.0))
        power.append((paired(a, b, np.ones(22))[-1] < 0.05).mean())
    assert power[0] > 0.3 and power[1] > 0.7


def frame_of(values: dict[str, np.ndarray]) -> pd.DataFrame:
    """Rows of `Store.items`: values [tests, documents, seeds] by line."""
    parts = []
    for line, found in values.items():
        places = np.indices(found.shape).reshape(3, -1)
        own = {"name": places[0], "item": places[1], "seed": places[2], "value": found.ravel()}
        parts.append(pd.DataFrame(own).assign(line=line, dense=0.0))
    constant = {"measure": "perplexity", "metric": "perplexity", "shown": "t perplexity"}
    constant |= {"weight": 1.0, "sparsity_target": 0.5, "fingerprint": "f", "true_error": False}
    return pd.concat(parts, ignore_index=True).assign(method="informed", **constant)


def test_the_table_resamples_seeds_and_documents():
    """Averaged over seeds first, equal recipes were told apart in half of the cases."""
    draw = np.random.default_rng(0)
    table = compare(frame_of({line: recipes(draw, (150,), 3, 0.08) for line in "ab"}))
    pairs = table[(table.a == "a") & (table.b == "b")]
    assert len(pairs) == 150 and (pairs.p < 0.05).mean() <= 0.06
    assert set(pairs.test) == {"t over seeds and items"}


@pytest.mark.parametrize("seeds", [1, 2])
def test_too_few_seeds_say_nothing_of_recipes(seeds):
    draw = np.random.default_rng(0)
    values = {line: recipes(draw, (3,), seeds, 0.3) + shift for line, shift in (("a", 9), ("b", 0))}
    items = frame_of(values)
    table = compare(items)
    assert table.p_holm.isna().all()
    assert table[table.a == "a"].p.to_numpy() == pytest.approx(2 / (1 + DRAWS))  # no draw is beyond
    assert set(VIEW.table(items)[1]["p (Holm)"]) == {"too few seeds"}


def table_after(words: str) -> list[list[str]]:
    """Cells of the first table of docs/report.md that follows the words."""
    lines = (ROOT / "docs" / "report.md").read_text().partition(words)[2].splitlines()
    first = next(place for place, line in enumerate(lines) if line.startswith("|"))
    cells = itertools.takewhile(lambda line: line.startswith("|"), lines[first:])
    return [[cell.strip(" %") for cell in line.strip("|").split("|")] for line in cells]


def test_items_of_the_docs_are_those_that_are_needed():
    heading, _, *body = table_after("*Items*")
    for cell, *numbers in body:
        for share, number in zip(heading[1:], numbers, strict=True):
            disagree, difference = float(share.split()[0]) / 100, float(cell)
            if disagree >= difference:
                assert number == str(items_needed(difference, disagree))


@pytest.mark.parametrize(("difference", "disagree"), [(0.02, 0.1), (0.05, 0.05), (0.1, 0.2)])
def test_items_needed_have_the_power_that_is_promised(difference, disagree):
    """The exact test over simulated answers; a tenth fewer items have less."""
    draw, enough = np.random.default_rng(0), items_needed(difference, disagree)
    power = []
    for count in (int(0.9 * enough), enough):
        only_a = (disagree + difference) / 2
        chances = [only_a, disagree - only_a, 1 - disagree]
        counts = draw.multinomial(count, chances, size=6000)[:, :2]
        found = {
            tuple(pair): sampled
            for pair, sampled in zip(*np.unique(counts, axis=0, return_counts=True), strict=True)
        }
        rejected = sum(
            times
            for (a, b), times in found.items()
            if a + b and stats.binomtest(a, a + b).pvalue <= 0.05
        )
        power.append(rejected / 6000)
    assert power[0] < 0.79 < power[1] < 0.83
    assert mcnemar_power(enough, difference, disagree) >= 0.8


def test_seeds_of_the_docs_are_the_fewest_with_the_power_that_is_promised():
    """From the non-central t distribution; one seed fewer has less."""
    heading, _, (_, *numbers) = table_after("*Seeds*")
    for ratio, number in zip(heading[1:], numbers, strict=True):
        power = []
        for n in (int(number) - 1, int(number)):
            bound, shift = stats.t.ppf(0.975, 2 * n - 2), float(ratio) / (2 / n) ** 0.5
            power.append(stats.nct.sf(bound, 2 * n - 2, shift))
        assert power[0] < 0.8 <= power[1]


def test_holm():
    assert holm(np.array([0.04, 0.01, 0.03])) == pytest.approx([0.06, 0.03, 0.06])
    assert holm(np.array([0.9, 0.8])) == pytest.approx([1.0, 1.0])


def point(folder, method: str, values, dense, nll, seed=0, target=0.3, **changes) -> None:
    accuracy = {"value": values.mean(), "stderr": 0.03, "dense": dense.mean(), "n": len(dense)}
    per_token = [sum(nll) / len(nll) / 100, (600 + len(nll) - 1) / 200]
    perplexity, beside = np.exp(per_token)
    record = {"perplexity": perplexity, "dense": beside, "accuracy": {"piqa": accuracy}}
    record |= changes
    path = write_point(folder, method, target, seed=seed, **record)
    task = {"measure": "accuracy", "name": "piqa", "metric": "acc", "weight": 1.0}
    text = {"measure": "perplexity", "name": "sotu", "metric": "nll", "weight": 100.0}
    rows = [
        {**task, "item": f"i{i}", "value": v, "dense": d}
        for i, (v, d) in enumerate(zip(values, dense, strict=True))
    ]
    rows += [{**text, "item": f"d{i}", "value": v, "dense": 300.0 + i} for i, v in enumerate(nll)]
    pd.DataFrame(rows).to_parquet(path / "items.parquet")


@pytest.fixture
def store(tmp_path):
    draw = np.random.default_rng(0)
    dense = draw.integers(0, 2, 300).astype(float)
    better = np.where(draw.random(300) < 0.1, 1 - dense, dense)
    worse = np.where(draw.random(300) < 0.4, 0.0, dense)
    nll = 320 + draw.normal(0, 5, 20)
    for seed in range(3):
        point(tmp_path, "informed", better, dense, nll + seed, seed)
        point(tmp_path, "greedy", worse, dense, nll + 30 + draw.normal(0, 5, 20), seed)
    return tmp_path


def test_compare(store):
    items = Store(store).items
    table = compare(items).set_index(["name", "a", "b"])
    assert len(table) == 6
    row = table.loc[("piqa", "greedy", "informed")]
    piqa = items[items.name == "piqa"].pivot_table(index="item", columns="method", values="value")
    assert row.difference == pytest.approx((piqa.greedy - piqa.informed).mean())
    assert row.low < row.difference < row.high < 0
    assert (row.test, row.n, row.a_seeds) == ("t over seeds and items", 300, 3)
    assert len(row.fingerprints.split()) == 6
    text = table.loc[("sotu", "greedy", "informed")]
    assert text.difference == pytest.approx(text.a_value / text.b_value)
    assert 1 < text.low < text.difference < text.high
    assert text.p_holm < 0.01
    assert ("piqa", "dense", "informed") in table.index


def test_one_seed_of_a_task_is_mcnemar_s(store):
    items = Store(store).items.query("seed == 0")
    row = compare(items).set_index(["name", "a", "b"]).loc[("piqa", "greedy", "informed")]
    piqa = items[items.name == "piqa"].pivot(index="item", columns="method", values="value")
    assert row.p == pytest.approx(mcnemar(piqa.greedy.to_numpy(), piqa.informed.to_numpy()))
    assert row.test == "mcnemar" and np.isnan(row.p_holm)


def test_one_seed_of_a_text_is_the_bootstrap_s(store):
    items = Store(store).items.query("seed == 0")
    row = compare(items).set_index(["name", "a", "b"]).loc[("sotu", "greedy", "informed")]
    text = items[items.name == "sotu"].pivot(index="item", columns="method", values="value")
    greedy, informed = text.greedy.to_numpy(), text.informed.to_numpy()
    expected = perplexity_ratio(greedy, informed, np.full(len(greedy), 100.0))
    assert (row.low, row.high, row.p) == pytest.approx((expected.low, expected.high, expected.p))
    assert row.difference == pytest.approx(expected.value)
    assert row.test == "bootstrap over documents"


def test_items_of_one_seed_only_are_paired_by_the_seeds_that_have_them(tmp_path):
    """Built-in tasks draw their items from the seed."""
    draw = np.random.default_rng(0)
    values = {line: recipes(draw, (1,), 3, 0.1) + shift for line, shift in (("a", 5), ("b", 0))}
    items = frame_of(values)
    items["item"] = items["item"] + 100 * items["seed"]
    row = compare(items).set_index(["a", "b"]).loc[("a", "b")]
    means = {line: found.mean() for line, found in values.items()}
    assert row.n == 66 and row.difference == pytest.approx(np.exp(means["a"] - means["b"]))


def test_tables_are_written(store):
    write(VIEW, Paths(store, store / "plots"))
    written = {path.name for path in (store / "plots").iterdir()}
    assert written == {f"significance-tiny-sotu-quick.{ending}" for ending in ("csv", "md", "tex")}
    text = (store / "plots" / "significance-tiny-sotu-quick.md").read_text()
    assert "seeds and items" in text and "*" in text


def test_no_items_is_one_line(tmp_path):
    write_point(tmp_path, "informed", 0.3, perplexity=30.0)
    with pytest.raises(AnalysisError, match="force=true"):
        write(VIEW, Paths(tmp_path, tmp_path))


def test_the_table_is_json_free_of_objects(store):
    json.dumps(compare(Store(store).items).to_dict(orient="list"))
