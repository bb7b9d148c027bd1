"""Each item's figures stand beside the dense model's."""

from __future__ import annotations

import pandas as pd

from runners.evaluation.scores import Items
from runners.store.items import COLUMNS, write_items


def test_items_are_paired_by_key_and_choices_have_a_second_figure(tmp_path):
    task = Items("accuracy", "acc", ["a", "b"], [1.0, 0.0], [1.0, 1.0], [-0.1, -2.0])
    text = Items("perplexity", "nll", ["d"], [30.0], [9.0])
    dense_task = Items("accuracy", "acc", ["b", "a"], [1.0, 0.0], [1.0, 1.0], [-0.5, -0.7])
    dense_text = Items("perplexity", "nll", ["d"], [20.0], [9.0])
    routed, dense = (
        {"q": vars(task), "t": vars(text)},
        {"q": vars(dense_task), "t": vars(dense_text)},
    )
    write_items(tmp_path / "items.parquet", routed, dense)
    found = pd.read_parquet(tmp_path / "items.parquet")
    assert tuple(found.columns) == COLUMNS
    assert found.to_numpy().tolist() == [
        ["accuracy", "q", "acc", "a", 1.0, 1.0, 0.0],
        ["accuracy", "q", "acc", "b", 0.0, 1.0, 1.0],
        ["margin", "q", "margin", "a", -0.1, 1.0, -0.7],
        ["margin", "q", "margin", "b", -2.0, 1.0, -0.5],
        ["perplexity", "t", "nll", "d", 30.0, 9.0, 20.0],
    ]


def test_no_items_are_an_empty_table(tmp_path):
    write_items(tmp_path / "items.parquet", {}, {})
    assert tuple(pd.read_parquet(tmp_path / "items.parquet").columns) == COLUMNS
