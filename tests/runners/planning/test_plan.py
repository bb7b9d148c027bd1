"""`runners/plan.py`: what it says against what a sweep then does, and against formulas."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from methods.engine.decoder.families import shape_of
from methods.engine.routed import attach, routed
from methods.informed import Informed
from runners.job import run_point
from runners.planning.estimate import Planner, _kept, totals
from runners.point import build
from runners.point_config import CONF, PointConfig
from runners.runtime.memory import give_back
from runners.training.loop import Loop
from tests.conftest import Commands
from tests.runners.runtime.test_memory import resident_bytes

OPTIONS = {"utilisation": 1.0, "cached": False, "texts": {}, "tasks": {}}
M_MMAP_THRESHOLD = -3
"""Of mallopt(3)."""
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
    # passes that no search decides
    assert planned["router_start"] == spent["router_start"]
    assert planned["forecasters"] == spent["forecasters"]


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
    words = ("method=informed", "target=flops", "sparsity=0.1,0.9", "-m", f"plan.json={file}")
    assert commands.run("plan", *words).code == 0
    first, second = json.loads(file.read_text())["points"]
    assert first["refused"] is None and "target=flops" in second["refused"]


class Counted(TorchDispatchMode):
    """FLOPs of every operation inside."""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func._overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out


def test_a_plan_is_within_twice_a_real_run(tiny_config):
    """Tokens of each stage against the record's, FLOPs against a count of every operation."""
    config = tiny_config("method=informed", "method.rank=4", "sparsity=0.3", "mode=masked")
    planner = Planner({"dtype": "float32", "peak_tflops": {"float32": 1.0}}, OPTIONS)
    planned = planner.point(PointConfig.parse(config))
    with Counted() as counted:
        run_point(OmegaConf.create(config))
    folder = Path(config["results_dir"]) / planned.fingerprint
    record = json.loads((folder / "result.json").read_text())
    spent = {report["name"]: report["tokens"] for report in record["stages"]}
    stages = {part.name: part for part in planned.parts if not part.name.startswith("evaluate")}
    assert list(spent) == list(stages)
    for name, tokens in spent.items():
        assert 0.5 < stages[name].tokens / tokens < 2.0, name
    assert 0.5 < totals([planned])["flops"] / counted.flops < 2.0


def test_kept_activations_are_within_twice_of_what_autograd_keeps(tiny_llama):
    """By saved tensors of a step on the masked path, one layer's share."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    method = attach(tiny_llama, Informed(sparsity=0.5, rank=4))
    weights = {p.untyped_storage().data_ptr() for p in tiny_llama.parameters()}
    rows = torch.randint(3, 250, (2, 64))
    with saved_tensors_hooks(pack, lambda tensor: tensor), routed(tiny_llama, method) as model:
        for parameter in method.parameters():
            parameter.requires_grad_(True)
        model.model(rows)
    shape = shape_of(tiny_llama.config)
    found = sum(size for place, size in kept.items() if place not in weights)
    assert 0.5 < _kept(shape) * shape.layers * rows.numel() * 4 / found < 2.0


@pytest.mark.slow
def test_the_paper_preset_has_its_real_sizes_without_weights(commands, tmp_path):
    words = ("experiment=paper_llama3_8b", "hardware=h100", "plan.cached=false", "-m")
    places = (f"results_dir={commands.results}", "tracking=off", f"plan.json={tmp_path / 'p.json'}")
    done = commands.run("plan", *words, *places, shrink=False)
    assert done.code == 0, done.stderr
    found = json.loads((tmp_path / "p.json").read_text())
    assert found["points"][0]["parts"][0]["bytes"]["weights"] == pytest.approx(16.06e9, rel=0.01)
    assert {p["cached"] for point in found["points"] for p in point["parts"]} == {None}


@pytest.mark.slow
def test_memory_of_a_fit_is_what_was_planned(tmp_path):
    """Statistics of all sites beside a 1B model, about 8 GB in all; some minutes."""
    # what glibc keeps of freed blocks, up to 1 GB here, is not the fit's
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)
    words = ["model=llama3_2_1b_shape", "dtype=float32", "budget.fit_tokens=4096"]
    words += [f"results_dir={tmp_path}"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        resolved = OmegaConf.to_container(compose("sweep", overrides=words), resolve=True)
    config = PointConfig.parse(resolved)
    planner = Planner({"dtype": "float32", "peak_tflops": {"float32": 1.0}}, OPTIONS)
    planned = planner.point(config).parts[0]
    give_back()
    before = resident_bytes()
    built = build(config)
    stage = next(iter(built.method.stages(built.budget)))
    parts = (built.base.model, built.method, built.probe, built.texts.rows)
    peak = Loop(*parts, objective="lm", seed=0).run(stage).peak_memory_bytes
    assert stage.name == planned.name and "statistics" in planned.bytes
    assert peak - before == pytest.approx(sum(planned.bytes.values()), rel=0.1)
