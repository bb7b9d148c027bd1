"""Paired intervals cover what they say: simulation, closed forms, scipy."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis import ablation, pareto, significance, tradeoff
from analysis.drawing import style
from analysis.frames import Store
from analysis.intervals import accuracy_difference, mcnemar, perplexity_ratio
from analysis.report_page.records import records_of
from tests.analysis.store import write_point
from tests.analysis.test_significance import point

LOSSES = ("skewed", "heavy tails", "two humps")
"""Of a document, in nats a token above dense. Two humps: texts that begin with a token that a
router bypasses lose twice as much as others."""


def documents(draw, kind: str, shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """Nats of the routed and of the dense model, and tokens: unequal, correlated, noisy."""
    tokens = np.minimum(np.exp(draw.normal(6.0, 0.5, shape)), 512).round().clip(16)
    normal, hard = draw.normal(size=shape), draw.normal(size=shape)
    excess = {
        "skewed": lambda: 0.4 * np.exp(0.5 * normal - 0.125),
        "heavy tails": lambda: 0.4 + 0.1 * draw.standard_t(3, shape),
        "two humps": lambda: np.where(draw.random(shape) < 0.35, 0.65, 0.27) + 0.07 * normal,
    }[kind]()
    excess += 0.05 * hard - 0.1 * np.log(tokens / 400) + draw.normal(size=shape) / tokens**0.5
    dense = (3.1 + 0.2 * hard) * tokens
    return dense + excess * tokens, dense, tokens


def truth(kind: str) -> float:
    routed, dense, tokens = documents(np.random.default_rng(9), kind, (4_000_000,))
    return float(np.exp((routed - dense).sum() / tokens.sum()))


def coverage(kind: str, count: int, times: int) -> float:
    drawn = documents(np.random.default_rng(count), kind, (times, count))
    found, true = [perplexity_ratio(*one) for one in zip(*drawn, strict=True)], truth(kind)
    return float(np.mean([one.low <= true <= one.high for one in found]))


@pytest.mark.parametrize("count", [10, 22, 100])
@pytest.mark.parametrize("kind", LOSSES)
def test_a_ratio_of_perplexities_is_covered(kind, count):
    """One standard error of 800 draws is 0.8 %."""
    assert 0.935 <= coverage(kind, count, 800) <= 0.975


@pytest.mark.slow
@pytest.mark.parametrize("count", [10, 22, 100])
@pytest.mark.parametrize("kind", LOSSES)
def test_a_ratio_of_perplexities_is_covered_in_93_to_97_percent(kind, count):
    assert 0.93 <= coverage(kind, count, 10_000) <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("how", ["percentile", "BCa"])
def test_scipy_covers_less_at_ten_documents(how):
    """Why the bootstrap is our own."""
    routed, dense, tokens = documents(np.random.default_rng(10), "skewed", (1000, 10))
    true, inside = np.log(truth("skewed")), 0
    for one in zip(routed - dense, tokens, strict=True):
        found = stats.bootstrap(
            one,
            lambda sums, sizes, axis=-1: sums.sum(axis=axis) / sizes.sum(axis=axis),
            paired=True,
            n_resamples=999,
            method=how,
            rng=np.random.default_rng(0),
        )
        inside += found.confidence_interval.low <= true <= found.confidence_interval.high
    assert inside / 1000 < 0.92


@pytest.mark.parametrize("count", [50, 100, 400])
@pytest.mark.parametrize("disagree", [0.05, 0.15, 0.3])
def test_a_difference_of_accuracies_is_covered(count, disagree):
    """By more than it says where hardly an item is answered differently, never by less."""
    draw, lead = np.random.default_rng(0), 0.4 * disagree
    chances = [(disagree + lead) / 2, (disagree - lead) / 2, 1 - disagree]
    only_a, only_b, _ = draw.multinomial(count, chances, size=1000).T
    inside = 0
    for one, other in zip(only_a, only_b, strict=True):
        a, b = np.zeros(count), np.zeros(count)
        a[:one], b[one : one + other] = 1, 1
        found = accuracy_difference(a, b)
        inside += found.low <= lead <= found.high
        assert found.value == pytest.approx((one - other) / count)
    assert 0.935 <= inside / 1000 <= (0.97 if count * disagree > 10 else 1)


def test_no_disagreement_is_no_certainty():
    found = accuracy_difference(np.ones(50), np.ones(50))
    assert found.value == 0 and found.low == -found.high < -0.03 and found.p == 1.0


def test_p_of_a_difference_is_mcnemar_s_or_of_means_over_seeds_a_t_test():
    draw = np.random.default_rng(0)
    a, b = draw.integers(0, 2, (2, 60)).astype(float)
    assert accuracy_difference(a, b).p == mcnemar(a, b)
    mean = (a + b) / 2
    assert accuracy_difference(mean, b).p == pytest.approx(stats.ttest_rel(mean, b).pvalue)


def test_many_documents_of_one_length_are_student_s():
    draw = np.random.default_rng(0)
    routed, dense = draw.normal(1200, 30, 2000), draw.normal(1000, 30, 2000)
    found = perplexity_ratio(routed, dense, np.full(2000, 400.0))
    expected = stats.ttest_rel(routed / 400, dense / 400).confidence_interval()
    assert np.log([found.low, found.high]) == pytest.approx([*expected], rel=1e-3)


def test_a_ratio_turns_with_its_sides_and_ignores_the_order():
    routed, dense, tokens = documents(np.random.default_rng(3), "skewed", (22,))
    one, other = perplexity_ratio(routed, dense, tokens), perplexity_ratio(dense, routed, tokens)
    assert other.value == pytest.approx(1 / one.value)
    assert (other.low, other.high) == pytest.approx((1 / one.high, 1 / one.low), rel=1e-3)
    assert other.p == one.p < 0.01
    assert one.low < one.value < one.high


def test_equal_models_and_single_documents():
    nll, tokens = np.array([100.0, 300.0, 250.0]), np.array([40.0, 90.0, 80.0])
    assert perplexity_ratio(nll, nll, tokens) == (1.0, 1.0, 1.0, 1.0)
    assert perplexity_ratio(nll + tokens, nll, tokens) == pytest.approx((np.e, np.e, np.e, 0.0))
    alone = perplexity_ratio(nll[:1] + 40, nll[:1], tokens[:1])
    assert alone.value == pytest.approx(np.e) and np.isnan([*alone[1:]]).all()


def test_frames_pair_documents_and_items_with_dense(tmp_path):
    """Averaged over seeds first; a point without items has its ratio and no interval."""
    draw = np.random.default_rng(0)
    dense, nll = draw.integers(0, 2, 80).astype(float), 300 + draw.normal(40, 5, (2, 12))
    for seed in range(2):
        point(tmp_path, "informed", 1 - dense if seed else dense, dense, nll[seed], seed)
    store = Store(tmp_path)
    by_measure = store.averaged.set_index("measure")
    text, task = by_measure.loc["perplexity"], by_measure.loc["accuracy"]
    expected = perplexity_ratio(nll.mean(axis=0), 300.0 + np.arange(12), np.full(12, 100.0))
    ends = text.ratio_low, text.ratio_high  # the order of documents changes a draw
    assert ends == pytest.approx((expected.low, expected.high), rel=0.01)
    assert text.ratio == pytest.approx(text.value / text.dense) and np.isnan(text.difference)
    expected = accuracy_difference(np.full(80, 0.5), dense)
    assert (task.difference_low, task.difference_high) == (expected.low, expected.high)
    assert task.difference == pytest.approx(task.value - task.dense) and np.isnan(task.ratio)
    one = store.measures[store.measures["measure"] == "perplexity"].set_index("seed").loc[1]
    expected = perplexity_ratio(nll[1], 300.0 + np.arange(12), np.full(12, 100.0))
    ends = one.ratio_low, one.ratio_high
    assert ends == pytest.approx((expected.low, expected.high), rel=0.01)
    for path in tmp_path.glob("*/items.parquet"):
        path.unlink()
    bare = Store(tmp_path).averaged.set_index("measure").loc["perplexity"]
    assert bare.ratio == pytest.approx(text.ratio) and np.isnan(bare.ratio_low)


@pytest.fixture
def shown(tmp_path):
    """Two targets of two lines, one of them with two seeds."""
    draw = np.random.default_rng(0)
    dense = draw.integers(0, 2, 80).astype(float)
    for method, seeds in (("informed", 2), ("greedy", 1)):
        for target in (0.3, 0.5):
            for seed in range(seeds):
                nll = 300 + draw.normal(100 * target, 5, 12)
                own = np.where(draw.random(80) < target, 0.0, dense)
                point(tmp_path, method, own, dense, nll, seed, target)
    return Store(tmp_path)


def test_pictures_draw_the_paired_interval(shown):
    """As a band and, with one seed, as the bars; seeds have their spread as bars."""
    with style.paper():
        panel = tradeoff.VIEW.draw(shown.averaged, "title").axes[0]
    rows = shown.averaged.query("measure == 'perplexity'").set_index(["method", "sparsity_target"])
    handles, labels = panel.get_legend_handles_labels()
    bars = dict(zip(labels, handles, strict=True))["greedy"].lines[2][0].get_segments()
    for target, segment in zip((0.3, 0.5), bars, strict=True):
        row = rows.loc[("greedy", target)]
        assert segment[:, 1] == pytest.approx((row.ratio_low, row.ratio_high))
    bars = dict(zip(labels, handles, strict=True))["informed"].lines[2][0].get_segments()
    row = rows.loc[("informed", 0.3)]
    assert bars[0][:, 1] == pytest.approx((row.low / row.dense, row.high / row.dense))
    bands = [band.get_paths()[0].get_extents() for band in panel.collections if band.get_alpha()]
    assert max(band.ymax for band in bands) == pytest.approx(rows.ratio_high.max())


def test_tables_show_the_paired_interval(shown):
    _, readable = tradeoff.table(shown.averaged)
    row = readable.set_index(["method", "target"]).loc[("greedy", "0.30")]
    number = r"[+-]?\d\.\d{3}"
    assert re.fullmatch(rf"{number} \[{number}, {number}\]", row["sotu perplexity / dense"])
    assert re.fullmatch(rf"{number} \[{number}, {number}\]", row["piqa accuracy - dense"])
    _, front = pareto.table(pareto.rows(shown))
    assert front["/ or - dense"].str.contains(r"\[").sum() == (front["method"] != "dense").sum()
    listed = records_of(shown, shown.points)["entries"][0]["figures"]
    assert any("x dense" in words and "[" in words for words in listed)


def test_margins_are_a_measure_of_tables_alone(tmp_path):
    draw = np.random.default_rng(0)
    own, dense = -draw.exponential(1.2, 80), -draw.exponential(1.0, 80)
    task = {"value": 0.5, "stderr": 0.05, "dense": 0.6, "n": 80, "metric": "acc", "chance": 0.25}
    task |= {"margin": own.mean(), "margin_stderr": 0.1}
    task |= {"dense_margin": dense.mean(), "sparsity_realised": 0.46}
    accuracy = {"piqa": task | {"shared_contexts": True}}
    path = write_point(tmp_path, "informed", 0.3, perplexity=30.0, accuracy=accuracy)
    items = {"measure": "margin", "name": "piqa", "metric": "margin"}
    rows = [
        items | {"item": f"i{i}", "value": v, "dense": d, "weight": 1.0}
        for i, (v, d) in enumerate(zip(own, dense, strict=True))
    ]
    pd.DataFrame(rows).to_parquet(path / "items.parquet")
    store = Store(tmp_path)
    row = store.averaged.set_index("measure").loc["margin"]
    expected = accuracy_difference(own, dense)
    assert row.difference == pytest.approx(expected.value) == pytest.approx((own - dense).mean())
    ends = row.difference_low, row.difference_high
    assert ends == pytest.approx((expected.low, expected.high), rel=0.1)
    half = stats.t.ppf(0.975, 79) * stats.sem(own - dense)
    assert row.difference_high - row.difference == pytest.approx(half, rel=0.15)
    assert "piqa margin - dense" in tradeoff.table(store.averaged)[1]
    assert set(significance.compare(store.items)["shown"]) == {"piqa margin"}
    with style.paper():
        figure = tradeoff.VIEW.draw(store.averaged, "title")
    assert not any("margin" in axes.get_ylabel() for axes in figure.axes)
    assert set(pareto.rows(store)["measure"]) == {"perplexity", "accuracy"}
    (entry,) = records_of(store, store.points)["entries"]
    assert any("realised 0.460 there, each context counted once" in f for f in entry["figures"])


def test_an_ablation_is_paired_with_the_whole_method(tmp_path):
    draw = np.random.default_rng(0)
    whole = 300 + draw.normal(40, 5, 12)
    for parts, nll in (([], whole), (["refit"], whole + 10 + draw.normal(0, 1, 12))):
        options = {"variant": str(parts), "options": {"without": parts}}
        point(tmp_path, "informed_plus", np.ones(9), np.ones(9), nll, **options)
    store = Store(tmp_path)
    found = ablation.rows(store).set_index("without")
    part = found.loc["refit"]
    expected = perplexity_ratio(nll, whole, np.full(12, 100.0))
    assert part.of_whole == pytest.approx(expected.value)
    ends = part.of_whole_low, part.of_whole_high
    assert ends == pytest.approx((expected.low, expected.high), rel=0.01)
    assert part.of_whole_high - part.of_whole_low < (part.ratio_high - part.ratio_low) / 2
    readable = ablation.table(ablation.rows(store))[1].set_index("without")
    assert readable.loc["all parts", "x whole"] == "1.000"
    assert readable.loc["refit", "x whole"].startswith(f"{expected.value:.3f} [")
