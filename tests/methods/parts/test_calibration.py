"""Thresholds lie between scores, so that every way to compute a unit decides alike."""

from __future__ import annotations

import math

import pytest
import torch

from methods.engine.routed import routed
from methods.parts.calibration import between_scores
from runners.point import build_method
from runners.point_config import PointConfig
from tests.conftest import token_rows
from tests.methods.conftest import method_config, probe_for


@pytest.mark.parametrize(
    ("guess", "expected"),
    [(2.0, 2.5), (2.2, 2.5), (0.5, 0.5), (3.0, 3.003), (-math.inf, -math.inf)],
)
def test_the_middle_of_the_gap(guess, expected):
    scores = torch.tensor([2.0, 1.0, 3.0, 2.0, math.inf])
    assert between_scores(scores, guess) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["informed", "hero", "d_llm", "skipgpt", "random"])
def test_every_path_decides_alike_at_a_calibrated_threshold(tiny_llama, name):
    """On the calibration text itself: masked, gathered in rows, and token by token."""
    method = build_method(PointConfig.parse(method_config(name, "sparsity=0.4")), tiny_llama)
    probe = probe_for(tiny_llama, method)
    method.calibrate(probe, 0.4)
    threshold = float(method.threshold)
    scores = probe.routed_scores(threshold).scores
    below, above = scores[scores <= threshold].max(), scores[scores > threshold].min()
    assert below < threshold < above
    assert threshold == pytest.approx(float(below + above) / 2, abs=1e-5)
    ids = token_rows(32, 32, seed=1)[:3]
    found = {}
    with torch.no_grad():
        for mode in ("masked", "gathered"):
            with routed(tiny_llama, method, mode) as model:
                found[mode] = model(input_ids=ids).logits
                found[f"{mode}, one row"] = torch.cat(
                    [model(input_ids=i[None]).logits for i in ids]
                )
        with routed(tiny_llama, method, "gathered") as model:
            cache, parts = None, []
            for token in ids[0]:
                out = model(input_ids=token[None, None], past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                parts.append(out.logits)
    assert torch.allclose(torch.cat(parts, 1)[0], found["masked"][0], atol=1e-4)
    for way, logits in found.items():
        assert torch.allclose(logits, found["masked"], atol=1e-4), way
