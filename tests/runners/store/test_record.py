"""What the log says of a finished point."""

from __future__ import annotations

from dataclasses import replace

import pytest

from runners.store.record import Record


def result(realised: float, achievable: float = 0.4) -> Record:
    return Record(
        *("informed", "", "tiny", "sotu", 0, achievable),
        sparsity_realised=realised,
        realised={"achievable": achievable, "calibration": 0.401},
        perplexity={"sotu": {"value": 30.0, "dense": 20.0}},
        accuracy={"choice": {"value": 0.5, "dense": 0.75, "metric": "acc"}},
    )


def test_headline_names_every_figure_beside_the_dense_one():
    assert result(0.401).headline == (
        "realised 0.401, perplexity sotu 30.00 (dense 20.00), choice acc 0.500 (dense 0.750)"
    )


@pytest.mark.parametrize(("realised", "achievable"), [(0.39, 0.4), (0.41, 0.4), (0.5, 0.5)])
def test_a_point_near_what_it_aimed_at_needs_no_word(realised, achievable):
    """A discrete method aims at its nearest step, not at the target."""
    assert result(realised, achievable).drift is None


def test_a_point_that_drifted_says_where_it_stands():
    said = result(0.329).drift
    assert said is not None and "realised 0.329 on the test text, 0.401 on calibration" in said
    assert "points at 0.33, not at 0.40" in said


def stage(**figures):
    return {"name": "train", "sparsity": 0.4, "target": 0.4, **figures}


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ({}, 0),
        ({"sparsity": 0.36}, 1),
        ({"sparsity": 0.36, "target": 0.35}, 0),
        ({"sparsity": 0.2, "target": None}, 1),
        ({"sparsity": None}, 0),
    ],
    ids=str,
)
def test_a_stage_that_trained_elsewhere_than_it_is_judged_is_told_of(found, told):
    """One that trains for no target is compared with the point's."""
    record = replace(result(0.4), stages=[stage(**found)])
    assert len(record.warnings) == told
    assert all("stage train trained at sparsity" in line for line in record.warnings)
