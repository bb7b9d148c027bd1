"""The config keys device_map and max_memory: what is refused, what goes where, and the numbers."""

from __future__ import annotations

import copy
import functools
import gc
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from methods.base import Stage
from methods.engine.decoder.offload import offloading
from methods.engine.decoder.placement import placed
from runners.base_model import device_map, load
from runners.base_model.device_map import asked, layout
from runners.base_model.synthetic import tiny_model
from runners.errors import UserError
from runners.launching.check import check_point
from runners.launching.command_line import prepare
from runners.point import check_gradients
from runners.point_config import PlacementConfig, fingerprint
from tests.conftest import Commands, base_of, compose_tiny
from tests.runners.survival import RECIPE, outcome

PARTS = {"model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"}
LAYERS = {f"model.layers.{i}" for i in range(4)}


composed = functools.cache(compose_tiny)


def config(**changes):
    return {**copy.deepcopy(composed()), **changes}


REFUSED = [
    ({"device_map": "everywhere"}, "null, auto, balanced, sequential or a mapping"),
    ({"device_map": {}}, "or a mapping of modules to devices, not {}"),
    ({"device_map": {"lm_head": "tpu"}}, "device_map.lm_head: a place is .* not 'tpu'"),
    ({"device_map": {"": 0}}, "asks for CUDA, which is not available"),
    ({"device_map": {"": "cuda:1", "lm_head": "cpu"}}, "asks for CUDA, which is not available"),
    ({"device_map": "auto", "device": "cuda"}, "asks for CUDA, which is not available"),
    ({"device_map": "auto", "max_memory": {0: "1GiB", "cpu": "1GiB"}}, "asks for CUDA"),
    ({"device_map": {"": 0}, "device": "cpu"}, "device=cpu, but .* names GPU 0"),
    ({"device_map": "auto", "device": "cuda:1"}, "device=cuda:1 is one device"),
    ({"device_map": "auto", "max_memory": {"cpu": "much"}}, "max_memory.cpu must be like 20GiB"),
    ({"device_map": "auto", "max_memory": {"cpu": -1}}, "max_memory.cpu must be like 20GiB"),
    ({"device_map": "auto", "max_memory": {"ram": "1GiB"}}, "max_memory: a place is"),
    ({"device_map": "auto", "max_memory": {"disk": "1GiB"}}, "goes to disk"),
    ({"device_map": "auto", "max_memory": "20GiB"}, "max_memory must be a mapping"),
    ({"device_map": {"": "cpu"}, "max_memory": {"cpu": 1}}, "not a mapping"),
    ({"max_memory": {"cpu": "1GiB"}}, "max_memory does nothing without device_map"),
    ({"device_map": "auto", "merge_lora": True}, "merge_lora=true needs all weights in one place"),
]


@pytest.mark.parametrize(("changes", "says"), REFUSED)
def test_a_mistake_is_one_line_before_anything_loads(changes, says, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(UserError, match=says) as caught:
        check_point(config(**changes))
    assert "\n" not in str(caught.value)


def test_more_gpus_than_there_are(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    check_point(config(device_map={"": 1}))
    check_point(config(device_map="auto", max_memory={"1": "3GB", "cpu": 10**9}))
    with pytest.raises(UserError, match="names GPU 2; this machine has 2"):
        check_point(config(device_map={"": 0, "lm_head": "cuda:2"}))


@pytest.mark.parametrize(("key", "value"), [("graphs", True), ("kernels", "triton")])
def test_speed_needs_one_gpu_for_graphs_and_kernels(key, value):
    changed = config(device_map="auto")
    changed["speed"][key] = value
    with pytest.raises(UserError, match=rf"speed\.{key}=\w+ needs the whole model on one GPU"):
        check_point(changed)


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="device_map places the model of one process"):
        check_point(config(device_map="auto"))


def test_a_plan_may_be_for_another_machine(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    check_point({**compose_tiny(config_name="plan"), "device_map": {"": 0}})


def test_places_are_no_part_of_what_is_computed():
    assert fingerprint(config()) == fingerprint(config(device_map="auto", max_memory={"cpu": 1}))


def places(asked_for, memory=None, family="llama"):
    wanted = asked(PlacementConfig("cpu", "auto", asked_for, memory))
    model, _ = tiny_model(family=family)
    return layout(model, wanted)


def test_a_mapping_covers_every_part_by_its_longest_name():
    found = places({"": "cpu", "model.layers": "disk", "model.layers.2": "cpu"})
    assert found.keys() == PARTS | LAYERS
    assert {name for name, place in found.items() if place == "disk"} == LAYERS - {"model.layers.2"}


@pytest.mark.parametrize("word", device_map.WORDS)
def test_what_does_not_fit_goes_to_disk(word):
    assert set(places(word).values()) == {"cpu"}
    layer_bytes = 4 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 128)
    found = places(word, {"cpu": 3 * layer_bytes + 259 * 64 * 4})
    # room for one layer is kept free, to bring back one that is on disk
    assert [place for name, place in found.items() if name in LAYERS] == ["cpu"] * 2 + ["disk"] * 2


@pytest.mark.parametrize(
    ("asked_for", "says"),
    [
        ({"": "cpu", "model.layer.0": "disk"}, "names model.layer.0, which .* like model.layers.0"),
        ({"model": "cpu"}, "no place for lm_head"),
        ({"": "cpu", "lm_head": "disk"}, "share a weight: give both one place"),
        ({"": 0, "model.layers.1.mlp": 1}, "splits layer 1 between GPUs 0, 1"),
        ({"": 0, "model.layers.1": 1, "model.layers.1.mlp": "cpu"}, "splits layer 1 between"),
    ],
)
def test_a_map_that_no_model_can_run_with(asked_for, says):
    model, _ = tiny_model()
    wanted = asked(PlacementConfig("auto", "auto", asked_for, None))
    with pytest.raises(UserError, match=says):
        layout(model, wanted)


def test_a_layer_may_be_split_between_cpu_and_disk():
    found = places({"": "cpu", "model.layers.1.mlp": "disk"})
    assert found["model.layers.1.mlp.down_proj"] == "disk"
    assert found["model.layers.1.self_attn.q_proj"] == "cpu"


def test_training_by_gradient_over_several_gpus_is_refused():
    stages = [Stage("start", fit=print), Stage("routers", loss=sum)]
    with pytest.raises(UserError, match="method informed trains routers by gradient"):
        check_gradients("informed", stages)
    check_gradients("informed", stages[:1])


@dataclass(frozen=True)
class Saved:
    """A checkpoint in float32, in several files."""

    folder: Path

    def load(self, cache: Path, **changes):
        model = {"name": "m", "source": "pretrained", "path": str(self.folder)}
        model |= {"revision": None, "trust_remote_code": False}
        return base_of(config(model=model, cache_dir=str(cache), device="cpu", **changes))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model, tokenizer = tiny_model(family="qwen2", seed=5)
    model.save_pretrained(folder, max_shard_size="300KB")
    tokenizer.save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return Saved(folder)


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_a_checkpoint_is_read_where_it_lies(saved, dtype, tmp_path):
    whole = saved.load(tmp_path, dtype=dtype)
    parted = saved.load(tmp_path, dtype=dtype, device_map={"": "cpu", "model.layers": "disk"})
    assert parted.weights_hash == whole.weights_hash
    assert placed(parted.model) and not placed(whole.model)
    assert offloading(parted.model.model.layers[3].mlp.up_proj) is not None
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        logits = [base.model(input_ids=ids).logits for base in (whole, parted)]
    assert torch.equal(*logits) and logits[0].dtype == getattr(torch, dtype)
    folders = list((tmp_path / "offload").iterdir())
    assert len(folders) == 1
    load._kept.clear()
    del parted
    gc.collect()
    assert not folders[0].exists()


def test_a_map_on_the_command_line_is_checked(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    words = ["model=tiny", "tracking=off"]
    prepare([*words, "device_map={model.layers.0:disk,model:cpu,lm_head:cpu}"], "sweep")
    prepare([*words, "device_map=balanced", "max_memory={cpu:1.5GiB}"], "sweep")
    with pytest.raises(UserError, match="asks for CUDA"):
        prepare([*words, "device_map={model.layers.0:0,model:cpu,lm_head:cpu}"], "sweep")


@pytest.mark.slow
def test_a_sweep_and_a_score_leave_what_they_leave_without_a_map(tmp_path):
    """Every stage with gradient, adapters too, with three of four layers on disk."""
    words = ("device_map=auto", "max_memory={cpu:390KiB}")
    found = []
    for name, extra in (("whole", ()), ("parted", words)):
        folder = tmp_path / name
        folder.mkdir()
        commands = Commands(folder, folder / "results", folder / "cache")
        done = commands.run("sweep", *RECIPE, "sparsity=0.4", *extra)
        assert done.code == 0, done.stderr
        assert ("parts on disk" in done.stdout + done.stderr) == bool(extra)
        (point,) = commands.results.iterdir()
        scored = Commands(folder, folder / "scored", folder / "cache2")
        done = scored.run("score", f"saved={point / 'routed'}", "sparsity=0.3", *extra)
        assert done.code == 0, done.stderr
        found.append((outcome(commands), list(outcome(scored).values())))
    assert found[0] == found[1]
