"""`runners/speed.py`: what it times, what it writes, and what it refuses."""

from __future__ import annotations

import math
import shutil
import signal
from typing import get_args, get_type_hints

import pytest
import torch
from omegaconf import OmegaConf

from methods.base import Site
from methods.engine.lora import attach_lora
from methods.engine.measure.flops import dense_flops
from methods.engine.ops import choose
from methods.engine.ops.cpu.build import reason_without
from methods.engine.routed import attach, routed
from methods.engine.routing import routing_of
from methods.informed import Informed
from runners import job
from runners.point_config import PointConfig, SpeedConfig
from runners.runtime.signals import Interrupted
from runners.store.files import read_checked
from runners.timing import bench
from runners.timing.bench import Bench, RandomDraw
from runners.timing.measure import measure
from runners.timing.stopwatch import Timing, interleaved, ratio
from tests.conftest import base_of
from tests.methods.conftest import small_ids, small_model

TIMED = (
    "speed.prefill={tokens:[24],batch_sizes:[1,2]}",
    "speed.decode={context:[16],batch_sizes:[1,2],steps:3}",
    "speed.repeats=2",
)


def written(commands) -> dict:
    (file,) = commands.results.glob("*/result.json")
    return read_checked(file)


@pytest.mark.parametrize("policy", [pytest.param("keep", marks=pytest.mark.slow), "evict"])
def test_drawn_decisions_on_random_weights_need_no_training(commands, policy):
    words = ("speed.decisions=random", "speed.trained=false", "sparsity=0.5")
    method = ("method=informed", "method.rank=4", f"method.kv_policy={policy}")
    done = commands.run("speed", *TIMED, *words, *method)
    assert done.code == 0, done.stderr
    record = written(commands)
    assert record["status"] == "complete" and record["evaluated"] is False
    assert record["stages"] == [] and record["perplexity"] == {}
    speed = record["speed"]
    assert {e["compiled_loops"] for e in speed["prefill"]} == {reason_without() is None}
    assert [(e["seq"], e["batch"]) for e in speed["prefill"]] == [(24, 1), (24, 2)]
    assert [(e["context"], e["batch"]) for e in speed["decode"]] == [(16, 1), (16, 2)]
    for entry in [*speed["prefill"], *speed["decode"]]:
        assert entry["efficiency"] == pytest.approx(entry["speedup"] / entry["bound"])
        assert entry["dense_tps"] > 0 and entry["routed_tps"] > 0
        assert 0.3 < entry["sparsity"] < 0.7
        assert entry["bound"] > 1.0
        assert set(entry["peak_memory_bytes"]) == {"dense", "routed"}
        assert {"router", "attention", "mlp", "other"} <= set(entry["parts_s"])
    for entry in speed["decode"]:
        held = entry["cache_bytes"]
        assert (held["routed"] < held["dense"]) == (policy == "evict")
    assert commands.run("speed", *TIMED, *words, *method, "speed.neighbours=1").code == 0
    both = [(case["neighbours"], case["batch"]) for case in written(commands)["speed"]["prefill"]]
    assert both == [(0, 1), (0, 2), (1, 1), (1, 2)]


@pytest.mark.slow
def test_a_trained_point_keeps_its_quality_and_gains_speed(commands):
    point = ("method=informed", "method.rank=4", "sparsity=0.3")
    assert commands.run("sweep", *point).code == 0
    before = written(commands)
    done = commands.run("speed", *TIMED, *point)
    assert done.code == 0, done.stderr
    after = written(commands)
    assert {case["decisions"] for case in after.pop("speed")["prefill"]} == {"real"}
    assert after == before
    drawn = ("speed.decisions=random", "speed.trained=false")
    assert commands.run("speed", *TIMED, *point, *drawn).code == 0
    both = [(case["decisions"], case["batch"]) for case in written(commands)["speed"]["prefill"]]
    assert both == [("real", 1), ("real", 2), ("random", 1), ("random", 2)]
    again = commands.run("sweep", *point, "force=true")
    assert again.code == 0 and "speed" in written(commands)


def test_a_stopped_run_keeps_the_cells_that_are_done(tiny_config, tmp_path, monkeypatch, caplog):
    def stop(*_):
        raise Interrupted(signal.SIGTERM)

    caplog.set_level("INFO")
    monkeypatch.setattr(Bench, "decode", stop)
    drawn = ("speed.decisions=random", "speed.trained=false", "sparsity=0.5", "method.rank=4")
    with pytest.raises(Interrupted):
        job.measure_speed(OmegaConf.create(tiny_config(*TIMED, *drawn)))
    (file,) = (tmp_path / "results").glob("*/result.json")
    cells = read_checked(file)["speed"]
    assert [cell["batch"] for cell in cells["prefill"]] == [1, 2] and cells["decode"] == []
    for batch in (1, 2):
        assert sum(line.startswith(f"prefill {batch} x 24: ") for line in caplog.messages) == 1


@pytest.mark.slow
def test_a_point_that_was_only_timed_is_still_to_be_evaluated(commands):
    point = ("method=greedy", "sparsity=0.3")
    assert commands.run("speed", *TIMED, *point).code == 0
    assert commands.run("sweep", *point).code == 0
    record = written(commands)
    assert record["perplexity"] and "speed" in record and record.get("evaluated", True)


def test_a_sweep_times_its_points_once_and_touches_no_quality(commands):
    """A point that has its record gets its timing alone, from what it saved, without the cache."""
    point = ("method=informed", "method.rank=4", "sparsity=0.3")
    assert commands.run("sweep", *point).code == 0
    before = written(commands)
    assert "speed" not in before
    shutil.rmtree(commands.cache / "stages")
    timed = (*point, "speed=sweep", *TIMED)
    done = commands.run("sweep", *timed)
    assert done.code == 0, done.stderr
    assert "skipped" in done.stdout and "stage " not in done.stdout
    after = written(commands)
    speed = after.pop("speed")
    assert after == before
    assert [(e["seq"], e["batch"]) for e in speed["prefill"]] == [(24, 1), (24, 2)]
    assert [(e["context"], e["batch"]) for e in speed["decode"]] == [(16, 1), (16, 2)]
    for case in [*speed["prefill"], *speed["decode"]]:
        assert (case["decisions"], case["trained"]) == ("real", True)
        assert case["speedup"] == pytest.approx(case["routed_tps"] / case["dense_tps"])
        assert case["sparsity"] == pytest.approx(before["sparsity_realised"], abs=0.2)
    assert commands.run("sweep", *timed).code == 0
    assert written(commands)["speed"] == speed, "a timed case is not timed again"
    longer = "speed.decode={context:[16,20],batch_sizes:[1],steps:3}"
    assert commands.run("sweep", *timed, longer).code == 0
    both = written(commands)["speed"]
    assert both["prefill"] == speed["prefill"]
    assert both["decode"][:2] == speed["decode"] and len(both["decode"]) == 3


def test_a_sweep_that_cannot_time_keeps_the_quality(commands):
    point = ("method=greedy", "sparsity=0.3", "speed=sweep", *TIMED)
    done = commands.run("sweep", *point, "speed.prefill={tokens:[24],batch_sizes:[9999999]}")
    assert done.code == 1 and "fewer than" in done.stdout + done.stderr
    record = written(commands)
    assert record["status"] == "complete" and record["perplexity"]


def test_adapters_are_timed_in_the_weights(tiny_config):
    config = PointConfig.parse(tiny_config("method=skipgpt", "speed=sweep"))
    base = base_of(tiny_config())
    method = attach(base.model, config.method.make(0.3))
    adapter = attach_lora(base.model, method, method.lora)
    assert not adapter.merged and config.speed is not None
    assert list(measure(config.speed, [], config.data, 0, base, method)) == []
    assert adapter.merged


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("speed.decisions=best", "speed.decisions"),
        ("speed.trained=false", "speed.decisions=random"),
        ("speed.prefill.tokens=[0]", "speed.prefill.tokens"),
        ("speed.kernels=cuda", "speed.kernels"),
        ("speed.neighbours=-1", "speed.neighbours"),
    ],
)
def test_bad_settings_are_one_line(commands, word, named):
    done = commands.run("speed", word)
    assert done.code == 2
    assert len(done.error_lines) == 1 and named in done.error_lines[0]


def test_compiled_loops_without_a_compiler_are_one_line(commands, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    done = commands.run("speed", "speed.kernels=compiled")
    assert done.code == 2
    assert len(done.error_lines) == 1 and "no C compiler" in done.error_lines[0]


def test_the_settings_are_those_of_the_engine():
    assert get_args(get_type_hints(SpeedConfig)["kernels"]) == choose.SETTINGS


def test_runs_take_turns_and_the_first_rounds_are_not_kept():
    order = []

    def run(name, seconds):
        return lambda: order.append(name) or seconds * len(order)

    cpu = torch.device("cpu")
    runs = [run("dense", 2.0), run("routed", 1.0)]
    dense, routed = interleaved(runs, device=cpu, warmup=1, repeats=2, label="t")
    assert order == ["dense", "routed"] * 3
    assert dense.seconds == [6.0, 10.0] and routed.seconds == [4.0, 6.0]
    assert ratio(dense, routed)["median"] == pytest.approx((6 / 4 + 10 / 6) / 2)
    assert Timing([3.0, 1.0, 2.0], 0).spread()["median"] == 2.0


@torch.no_grad()
def test_what_is_read_once_is_read_before_the_clock(monkeypatch):
    """And counted is the timed forward alone."""
    model, clock = small_model(), {"on": False, "reads": []}

    class Watched(Informed):
        def linear(self, site):
            clock["reads"].append(clock["on"])
            return super().linear(site)

    def timed(work, device):
        clock["on"] = True
        work()
        clock["on"] = False
        return 1.0

    method = attach(model, Watched(sparsity=0.5, rank=16))
    method.threshold.fill_(0.0)
    monkeypatch.setattr(bench, "timed", timed)
    ids = small_ids(2, 24)
    timing = Bench(model, method, ids, draw=None, warmup=0, repeats=1)
    entry = timing.prefill(24, 2)
    timing.decode(20, 1, 2)
    assert clock["reads"] and not any(clock["reads"])
    assert 0 < entry["sparsity"] < 1
    assert entry["sparsity"] == pytest.approx(routed_share(model, method, ids))


def routed_share(model, method, ids):
    with routed(model, method, "gathered"):
        model(input_ids=ids)
        return routing_of(model).counters.read().sparsity()


def test_draws_are_replayed_at_the_share_that_the_sites_can_bypass():
    draw = RandomDraw(0.25, 0.5, 0, torch.device("cpu"))
    valid = torch.ones(2, 4000, dtype=torch.bool)
    first = draw(Site(0, "mlp"), valid)
    assert float((~first).float().mean()) == pytest.approx(0.5, abs=0.03)
    later = [draw(Site(0, "mlp"), valid) for _ in range(16)]
    assert torch.equal(first, later[-1]) and not torch.equal(first, later[0])
    with pytest.raises(ValueError, match="out of reach"):
        RandomDraw(0.6, 0.5, 0, torch.device("cpu"))


def test_head_flops_count_the_logits_that_are_computed():
    from tests.methods.parts.text import SHAPE

    all_logits = dense_flops(SHAPE, tokens=10, context=55)
    last = dense_flops(SHAPE, tokens=10, context=55, head_tokens=1)
    assert all_logits - last == 9 * 2 * SHAPE.width * SHAPE.vocab
    assert math.isfinite(last)
