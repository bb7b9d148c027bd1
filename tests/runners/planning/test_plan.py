"""`runners/plan.py`: what it says against what a sweep then does, and against formulas."""

from __future__ import annotations

import json

import pytest
import torch

from methods.base import Site
from methods.engine.decoder.adapter import shape_of
from methods.engine.measure.flops import dense_flops
from methods.engine.routed import attach
from methods.informed import Informed
from runners.base_model.embedded import tiny_model
from runners.planning.dry_run import forward_cost, meta_model, visit_cost
from tests.conftest import Commands

RECIPE = ("method=informed", "method.rank=4", "sparsity=0.3,0.5", "-m")


def plan(commands: Commands, path, *words: str) -> dict:
    done = commands.run("plan", *words, f"plan.json={path}")
    assert done.code == 0, done.stderr
    assert f"total: {len(json.loads(path.read_text())['points'])} points" in done.stdout
    return json.loads(path.read_text())


@pytest.mark.slow
def test_plan_before_and_after_the_sweep(commands, tmp_path):
    before = plan(commands, tmp_path / "before.json", *RECIPE)
    assert not commands.results.exists()
    assert [point["complete"] for point in before["points"]] == [False, False]
    stages = [p for p in before["points"][0]["parts"] if not p["name"].startswith("evaluate")]
    assert [stage["cached"] for stage in stages] == [False] * len(stages)
    shared = {p["key"] for p in before["points"][0]["parts"]}
    shared &= {p["key"] for p in before["points"][1]["parts"]}
    assert len(shared) == len(stages)  # all but the calibration, and the dense evaluation
    assert 0 < before["total"]["hours_left"] == before["total"]["hours"]

    one = [word.replace("0.3,0.5", "0.3") for word in RECIPE if word != "-m"]
    assert commands.run("sweep", *one).code == 0
    after = plan(commands, tmp_path / "after.json", *RECIPE)
    done, other = after["points"]
    record = json.loads((commands.results / done["fingerprint"] / "result.json").read_text())
    assert (done["complete"], other["complete"]) == (True, False)
    cached = [p["cached"] for p in other["parts"] if not p["name"].startswith("evaluate")]
    assert cached == [*[True] * (len(cached) - 1), False]
    assert after["total"]["hours_left"] < before["total"]["hours_left"]
    planned = {part["name"]: part["tokens"] for part in done["parts"]}
    spent = {stage["name"]: stage["tokens"] for stage in record["stages"]}
    assert list(spent) == [n for n in planned if not n.startswith("evaluate")]
    # passes that no search decides; a record leaves out those of the stage's own report, which
    # reads a quarter of the 512 calibration tokens
    assert planned["router_start"] == spent["router_start"]
    assert planned["forecasters"] == spent["forecasters"] + 128


def test_a_mistake_is_one_line(commands):
    done = commands.run("plan", "sparsity=1.2")
    assert done.code == 2
    assert len(done.error_lines) == 1, done.stderr


@pytest.mark.slow
def test_points_out_of_reach_and_repeated_ones_are_named(commands, tmp_path):
    file = tmp_path / "plan.json"
    done = commands.run("plan", "method=dense", "sparsity=0.3,0.5", "-m")
    assert done.code == 0, done.stderr
    assert "#1 dense" in done.stdout and "the same point as #0" in done.stdout
    done = commands.run("plan", "method=mod", "sparsity=0.3,0.7", "-m", f"plan.json={file}")
    found = json.loads(file.read_text())
    first, second = found["points"]
    assert first["refused"] is None and first["parts"]
    assert "out of reach" in second["refused"] and not second["parts"]
    assert second["refused"] in done.stdout
    assert found["total"]["points_left"] == 1


def test_forward_flops_are_those_of_the_formula():
    config = tiny_model(family="llama")[0].config
    model, shape = meta_model(config, torch.float32), shape_of(config)
    found = forward_cost(model, batch=2, tokens=16, head=True)
    context = 2 * 16 * 17 // 2
    assert found.flops == pytest.approx(dense_flops(shape, tokens=32, context=context), rel=1e-6)
    assert found.bytes > 2 * 16 * shape.vocab * 4  # the logits at least


def test_moments_of_closed_forms_are_planned_for():
    config = tiny_model(family="llama")[0].config
    model = meta_model(config, torch.float32)
    with torch.device("meta"):
        method = attach(model, Informed(sparsity=0.5, rank=4))
    found = visit_cost(model, method, method.forecasters.solve, tokens=32)
    width, units = shape_of(config).width, len(shape_of(config).units())
    assert Site(0, "mlp") in method.forecasters
    kept = units * 2 * width * width * 8  # XX and XY, doubles, of each unit
    assert kept < found.bytes < 1.4 * kept
    assert found.flops == units * 2 * 2 * 32 * width * width


@pytest.mark.slow
def test_the_paper_preset_has_its_real_sizes_without_weights(commands, tmp_path):
    words = ("experiment=paper_llama3_8b", "hardware=h100", "plan.cached=false", "-m")
    places = (f"results_dir={commands.results}", "tracking=off", f"plan.json={tmp_path / 'p.json'}")
    done = commands.run("plan", *words, *places, shrink=False)
    assert done.code == 0, done.stderr
    found = json.loads((tmp_path / "p.json").read_text())
    assert found["points"][0]["parts"][0]["bytes"]["weights"] == pytest.approx(16.06e9, rel=0.01)
    assert {p["cached"] for point in found["points"] for p in point["parts"]} == {None}
