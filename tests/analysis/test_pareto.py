"""The front against the definition, checked for every pair."""

from __future__ import annotations

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis import pareto, tradeoff
from analysis.cli import Paths, write
from analysis.frames import Store
from tests.analysis.store import write_point

SMALL = st.integers(0, 6)


@given(st.lists(st.tuples(SMALL, SMALL), min_size=1, max_size=12))
def test_undominated_is_the_definition(pairs):
    cost, loss = (pd.Series([float(p[i]) for p in pairs]) for i in (0, 1))
    found = pareto.undominated(cost, loss)
    for i, (c, v) in enumerate(pairs):
        beaten = any(a <= c and b <= v and (a, b) != (c, v) for a, b in pairs)
        assert found[i] == (not beaten)


def test_the_oracle_is_no_contender_and_dense_is_one(tmp_path):
    write_point(tmp_path, "informed", 0.5, perplexity=30.0)
    write_point(tmp_path, "greedy", 0.5, perplexity=40.0, sparsity_realised=0.4, flops_ratio=0.7)
    bound = {"fingerprint": "oracle-0.5-0-", "budget": "quick", "upper_bound": True}
    write_point(tmp_path, "oracle", 0.5, perplexity=21.0, identity=bound)
    rows = pareto.rows(Store(tmp_path))
    assert set(rows.line) == {"informed", "greedy", "dense"}
    ppl = rows[rows.measure == "perplexity"].set_index("line")
    assert ppl.front_flops_ratio.to_dict() == {"informed": True, "greedy": False, "dense": True}
    assert (ppl.loc["dense", "value"], ppl.loc["dense", "flops_ratio"]) == (20.0, 1.0)
    accuracy = rows[rows.measure == "accuracy"].set_index("line")
    assert accuracy.loc["dense", "front_executed"]
    write(pareto.VIEW, Paths(tmp_path, tmp_path / "plots"))
    text = (tmp_path / "plots" / "pareto-tiny-sotu-quick.md").read_text()
    assert "| sotu perplexity | FLOPs | informed | 0.50 | 0.510 | 0.600 | 30.00" in text
    assert "greedy" not in text.split("sotu perplexity", 1)[1]
    assert "| dense | 0.00 | 0.000 | 1.000 | 20.00 |" in text


def test_a_dense_record_brings_its_interval(tmp_path):
    write_point(tmp_path, "dense", 0.0, perplexity=20.0)
    write_point(tmp_path, "informed", 0.5, perplexity=30.0)
    rows = pareto.rows(Store(tmp_path))
    (dense,) = rows[(rows.line == "dense") & (rows.measure == "perplexity")].to_dict("records")
    assert (dense["low"], dense["high"]) == pytest.approx((18.0, 22.0))


def test_a_reference_by_flops_is_never_drawn_or_ranked_by_sparsity(tmp_path):
    only = {"fingerprint": "channel_sparse-0.4-0-", "budget": "quick", "flops_only": True}
    write_point(tmp_path, "channel_sparse", 0.4, perplexity=21.0, identity=only)
    write_point(tmp_path, "informed", 0.4, perplexity=30.0)
    store = Store(tmp_path)
    assert store.points.set_index("line")["sparsity_realised"].isna()["channel_sparse"]
    assert store.layers.empty
    rows = pareto.rows(store)
    own = rows[(rows.line == "channel_sparse") & (rows.measure == "perplexity")].iloc[0]
    assert own.front_flops_ratio and not own.front_executed
    other = rows[(rows.line == "informed") & (rows.measure == "perplexity")].iloc[0]
    assert other.front_executed and not other.front_flops_ratio
    write(tradeoff.VIEW, Paths(tmp_path, tmp_path / "plots"))
    text = next((tmp_path / "plots").glob("tradeoff-*.md")).read_text()
    assert "| channel_sparse | 0.40 |  |" in text
