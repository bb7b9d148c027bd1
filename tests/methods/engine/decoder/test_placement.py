"""Models whose layers are kept off the device: the numbers of the same model in one place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from methods.base import Method, Site
from methods.engine.checkpoint import hash_model
from methods.engine.decoder import swap
from methods.engine.decoder.offload import OnDemand, offloaded_in, offloading
from methods.engine.decoder.placement import input_device, placed
from methods.engine.routed import routed
from methods.engine.routing import routing_of
from runners.point import build_method
from runners.point_config import PointConfig
from tests.methods.conftest import METHODS, PLAIN, method_config, small_ids, small_model
from tests.methods.engine.scripted import Scripted, all_sites, random_maps

LAYERS = 3
ENDS = ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head")


def one_layer_on_disk(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    places = dict.fromkeys((*ENDS, "model.layers.0", "model.layers.2"), "cpu")
    return dispatched(model, {**places, "model.layers.1": "disk"}, folder)


def all_on_disk(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    return dispatched(model, dict.fromkeys((*ENDS, "model.layers"), "disk"), folder)


def all_in_memory(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    moved: PreTrainedModel = cpu_offload(model, execution_device=torch.device("cpu"))
    return moved


def dispatched(model, places, folder):
    return dispatch_model(
        model, places, offload_dir=folder, skip_keys=model._skip_keys_device_placement
    )


PLACES: dict[str, Callable[[PreTrainedModel, Path], PreTrainedModel]] = {
    "one layer on disk": one_layer_on_disk,
    "all on disk": all_on_disk,
    "all in memory": all_in_memory,
}


@torch.no_grad()
def outputs(model: PreTrainedModel, method: Method, mode: str) -> list[Tensor]:
    """Logits of padded rows, of a prompt in two chunks and of four decoded tokens, and sparsity."""
    ids, mask = small_ids(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[1, :3] = 0
    torch.manual_seed(1)
    with routed(model, method, mode):
        found = [model(input_ids=ids, attention_mask=mask).logits]
        cache = DynamicCache(config=model.config)
        for start, end in ((0, 5), (5, 8), *((at, at + 1) for at in range(8, 12))):
            found.append(model(input_ids=ids[:1, start:end], past_key_values=cache).logits)
        found.append(torch.tensor(routing_of(model).counters.read().sparsity()))
    return found


def half_way(model: PreTrainedModel, method: Method) -> float:
    """The median score: about half is bypassed."""
    scores: list[Tensor] = []
    with torch.no_grad(), routed(model, method):
        routing_of(model).observer = lambda _, decision, __: scores.append(decision.scores_BT)
        model(input_ids=small_ids(2, 12))
    return float(torch.stack(scores).median()) if scores else 0.0


def same_with_and_without(
    family: str, where: str, config: str, modes: tuple[str, ...], folder: Path, *words: str
) -> None:
    whole = small_model(family, layers=LAYERS)
    parted = PLACES[where](small_model(family, layers=LAYERS), folder)
    point = PointConfig.parse(method_config(config, "sparsity=0.4", *words))
    methods = [build_method(point, model) for model in (whole, parted)]
    threshold = half_way(whole, methods[0])
    for method in methods:
        method.threshold.fill_(threshold)
    for mode in modes:
        expected, found = outputs(whole, methods[0], mode), outputs(parted, methods[1], mode)
        pairs = list(zip(expected, found, strict=True))
        assert all(torch.equal(a, b) for a, b in pairs), (
            mode,
            [(a - b).abs().max() for a, b in pairs],
        )
        if config not in ("dense", "layer_skip"):
            assert 0.1 < float(found[-1]) < 0.95
    assert all(p.device.type == "meta" for p in parted.model.layers[1].parameters())


@pytest.mark.parametrize("config", ["informed", "d_llm"])
def test_numbers_are_those_of_the_model_in_one_place(config, tmp_path):
    same_with_and_without("llama", "one layer on disk", config, ("masked", "gathered"), tmp_path)


@pytest.mark.parametrize("family", ["gemma2", "mixtral", "phi3"])
def test_numbers_of_families_that_differ_from_llama(family, tmp_path):
    both = ("masked", "gathered")
    same_with_and_without(family, "one layer on disk", "informed", both, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("config", METHODS)
@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("family", [*PLAIN, "gemma2", "mixtral"])
def test_numbers_of_every_family_method_and_place(family, where, config, tmp_path):
    same_with_and_without(family, where, config, ("masked", "gathered"), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", [*PLAIN, "gemma2", "mixtral"])
@pytest.mark.parametrize("policy", ["keep", "forecast"])
def test_numbers_under_each_kv_policy_of_forecasters(family, policy, tmp_path):
    words = (f"method.kv_policy={policy}",)
    same_with_and_without(family, "all on disk", "informed", ("gathered",), tmp_path, *words)


@pytest.mark.parametrize("where", PLACES)
def test_hash_is_that_of_the_model_in_one_place(where, tmp_path):
    model = PLACES[where](small_model(), tmp_path) if where != "one layer on disk" else None
    model = model or one_layer_on_disk(small_model(layers=LAYERS), tmp_path)
    assert hash_model(model) == hash_model(small_model(layers=len(model.model.layers)))
    assert placed(model) and input_device(model) == torch.device("cpu")


def watched(model: PreTrainedModel, monkeypatch) -> list[str]:
    """Names of the weights that are fetched from now on, in order."""
    fetched: list[str] = []
    names = {module: name for name, module in model.named_modules()}
    fetch = swap.Placement.__init__

    def init(self, parts):
        fetch(self, parts)
        for part in (part for layer in self.offloaded for part in layer):
            own, base = part.fetch, names[part.module]
            part.fetch = lambda name, own=own, base=base: (
                fetched.append(f"{base}.{name}") or own(name)
            )

    monkeypatch.setattr(swap.Placement, "__init__", init)
    return fetched


def skipping(model: PreTrainedModel, *skipped: Site, policy: str = "keep") -> Scripted:
    """Executes every token everywhere but at these sites, which none executes."""
    sites = all_sites(model, "unit")
    tables = {s: torch.full((2, 64), s not in skipped) for s in sites}
    return Scripted(tables, random_maps(sites, 32), kv_policy=policy)


@pytest.mark.parametrize("policy", ["keep", "evict"])
@torch.no_grad()
def test_a_unit_that_all_tokens_bypass_is_not_fetched(policy, tmp_path, monkeypatch):
    model = all_on_disk(small_model(layers=LAYERS), tmp_path)
    method = skipping(model, Site(1, "attention"), Site(2, "mlp"), policy=policy)
    fetched = watched(model, monkeypatch)
    with routed(model, method, "gathered"):
        model(input_ids=small_ids(2, 6))
    layer = [name for name in fetched if name.startswith("model.layers.1.self_attn")]
    keys = {f"model.layers.1.self_attn.{n}_proj.weight" for n in "kv"}
    assert set(layer) == (keys if policy == "keep" else set())
    assert not [name for name in fetched if name.startswith("model.layers.2.mlp")]
    whole = [name for name in fetched if name.startswith("model.layers.0.")]
    assert len(whole) == 9 and len(fetched) == len(set(fetched)), "each once"


@torch.no_grad()
def test_weights_are_given_back_after_each_layer_and_hooks_after_an_error(tmp_path):
    model = all_on_disk(small_model(layers=LAYERS), tmp_path)
    leaves = [part.module for part in offloaded_in(model.model.layers)]
    before = [(leaf._parameters, leaf.forward) for leaf in leaves]
    held: list[int] = []

    def count(*_):
        own = [leaf._parameters for leaf in leaves]
        assert all(isinstance(parameters, OnDemand) for parameters in own)
        held.append(sum(len(parameters.here) for parameters in own))

    hooks = [layer.register_forward_pre_hook(count) for layer in model.model.layers]
    method = skipping(model)
    with pytest.raises(KeyError, match="stop"), routed(model, method, "gathered"):
        model(input_ids=small_ids(2, 6))
        raise KeyError("stop")
    assert held == [0, 0, 0]
    for hook in hooks:
        hook.remove()
    after = [(leaf._parameters, leaf.forward) for leaf in leaves]
    assert all(
        a is b for pair in zip(before, after, strict=True) for a, b in zip(*pair, strict=True)
    )
    assert all(offloading(leaf) for leaf in leaves)


def test_gradients_are_the_same_and_hold_no_weights(tmp_path, monkeypatch):
    ids, found, kept = small_ids(2, 6), [], []
    for parted in (False, True):
        model = small_model(layers=LAYERS)
        if parted:
            model = all_on_disk(model, tmp_path)
            fetched = watched(model, monkeypatch)
        entered = model.get_input_embeddings()(ids).detach().requires_grad_()
        with routed(model, skipping(model, Site(1, "mlp"))):
            out = model(inputs_embeds=entered, use_cache=False).logits
            kept = list(fetched) if parted else []
            out.square().sum().backward()
        found.append(entered.grad)
    assert torch.equal(*found)
    assert set(fetched[len(kept) :]) >= {
        f"model.layers.{i}.self_attn.o_proj.weight" for i in range(3)
    }


def test_a_model_in_one_place_meets_none_of_this(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("asked about places")

    monkeypatch.setattr(swap.Placement, "__init__", refuse)
    monkeypatch.setattr("methods.engine.decoder.inputs.ForwardCall.move", refuse)
    monkeypatch.setattr("methods.engine.decoder.offload.hooks_of", refuse)
    monkeypatch.setattr("methods.engine.decoder.placement.hooks_of", refuse)
    model = small_model()
    for mode in ("masked", "gathered"):
        outputs(model, skipping(model, Site(1, "mlp")), mode)


def test_fused_kernels_are_refused(tmp_path):
    model = all_on_disk(small_model(), tmp_path)
    method = skipping(model)
    with pytest.raises(ValueError, match="leave device_map out"):  # noqa: SIM117
        with routed(model, method, "gathered", kernels="triton"):
            pass
    with routed(model, method, "gathered"):
        assert routing_of(model).kernels == "torch"
