"""Saved routed models: exact round trip, and one clear error for everything else."""

from __future__ import annotations

import json
import os
import sys
import types

import pytest
import torch
from safetensors.torch import load_file, save_file

from methods.engine.checkpoint import (
    SETTINGS,
    TENSORS,
    BadCheckpoint,
    from_pretrained,
    hash_model,
    load_tensors,
    save_pretrained,
)
from methods.engine.routed import attach, routed
from methods.informed import Informed
from methods.random import Random
from tests.methods.conftest import small_ids, small_model

OPTIONS = {"sparsity": 0.5, "rank": 4, "router": {"kind": "mlp", "width": 6}}


@pytest.fixture
def saved(tmp_path):
    """(model, method, folder) with random tensors and a threshold."""
    model = small_model()
    method = attach(model, Informed(**OPTIONS))
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.normal_(std=0.3)
        method.threshold.fill_(0.1)
    folder = tmp_path / "point"
    save_pretrained(
        method, folder, target="methods.informed.Informed", options=OPTIONS, base={"name": "x"}
    )
    return model, method, folder


def test_every_file_follows_the_umask(saved, tmp_path):
    _, method, _ = saved
    before = os.umask(0o027)
    try:
        save_pretrained(method, tmp_path / "group", target="", options={}, base={})
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "group").iterdir()}
    assert len(modes) == 2 and set(modes.values()) == {0o640}


def test_round_trip(saved):
    model, method, folder = saved
    again = from_pretrained(folder, model)
    assert not again.training
    ids = small_ids(2, 12)
    with torch.no_grad():
        with routed(model, method):
            expected = model(input_ids=ids).logits
        with routed(model, again):
            assert torch.equal(model(input_ids=ids).logits, expected)
        assert not torch.allclose(model(input_ids=ids).logits, expected, atol=0.1)
    assert again.state_dict().keys() == method.state_dict().keys()
    assert json.loads((folder / SETTINGS).read_text())["base"] == {"name": "x"}


def test_only_what_was_added_is_written(saved):
    model, method, folder = saved
    assert {path.name for path in folder.iterdir()} == {SETTINGS, TENSORS}
    stored = load_file(folder / TENSORS)
    assert stored.keys() == method.state_dict().keys()
    base = {value.data_ptr() for value in model.state_dict().values()}
    assert not base & {value.data_ptr() for value in method.state_dict().values()}


def test_saving_again_replaces(saved):
    model, method, folder = saved
    method.threshold.fill_(0.7)
    save_pretrained(method, folder, target="methods.informed.Informed", options=OPTIONS, base={})
    assert float(from_pretrained(folder, model).threshold) == pytest.approx(0.7)
    assert {path.name for path in folder.iterdir()} == {SETTINGS, TENSORS}


def rewrite(change):
    def damage(folder):
        tensors = load_file(folder / TENSORS)
        change(tensors)
        save_file(tensors, folder / TENSORS)

    return damage


def settings(**changes):
    def damage(folder):
        path = folder / SETTINGS
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


ROUTER = "routers.modules_by_site.0_mlp.head.weight"
DAMAGES = {
    "missing tensor": rewrite(lambda tensors: tensors.pop(ROUTER)),
    "missing threshold": rewrite(lambda tensors: tensors.pop("threshold")),
    "extra tensor": rewrite(lambda tensors: tensors.update(extra=torch.zeros(1))),
    "other shape": rewrite(lambda tensors: tensors.update({ROUTER: torch.zeros(2, 7)})),
    "transposed": rewrite(lambda t: t.update({ROUTER: t[ROUTER].T.contiguous()})),
    "truncated tensors": lambda folder: (folder / TENSORS).write_bytes(
        (folder / TENSORS).read_bytes()[:-40]
    ),
    "garbage tensors": lambda folder: (folder / TENSORS).write_bytes(b"\x80\x04nonsense"),
    "empty tensors": lambda folder: (folder / TENSORS).write_bytes(b""),
    "no tensors": lambda folder: (folder / TENSORS).unlink(),
    "truncated settings": lambda folder: (folder / SETTINGS).write_text('{"format": 1, "tar'),
    "binary settings": lambda folder: (folder / SETTINGS).write_bytes(b"\xff\xfe\x00"),
    "list settings": lambda folder: (folder / SETTINGS).write_text("[1]"),
    "no settings": lambda folder: (folder / SETTINGS).unlink(),
    "other format": settings(format=99),
    "no target": settings(target=None),
    "no options": settings(options=None),
    "foreign class": settings(target="os.system"),
    "engine class": settings(target="methods.engine.routed.Routing"),
    "base class of torch": settings(target="methods.informed.nn"),
    "missing module": settings(target="methods.nope.Nope"),
    "missing class": settings(target="methods.informed.Nope"),
    "bad option": settings(options={**OPTIONS, "nonsense": 1}),
    "bad value": settings(options={**OPTIONS, "sparsity": 1.2}),
    "other rank": settings(options={**OPTIONS, "rank": 5}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_anything_wrong_is_one_clear_error(saved, damage):
    model, _, folder = saved
    DAMAGES[damage](folder)
    with pytest.raises(BadCheckpoint) as caught:
        from_pretrained(folder, model)
    message = str(caught.value)
    assert message and "\n" not in message
    assert str(folder) in message or "methods." in message or "os.system" in message


def test_another_models_checkpoint_is_refused(saved):
    _, _, folder = saved
    with pytest.raises(BadCheckpoint, match="does not fit"):
        from_pretrained(folder, small_model(layers=3))
    with pytest.raises(BadCheckpoint, match="does not fit"):
        from_pretrained(folder, small_model(width=64))


def test_a_refused_file_leaves_the_method_alone(saved):
    _, method, folder = saved
    before = {name: value.clone() for name, value in method.state_dict().items()}
    DAMAGES["other shape"](folder)
    with pytest.raises(BadCheckpoint):
        load_tensors(method, load_file(folder / TENSORS), folder / TENSORS)
    assert all(torch.equal(method.state_dict()[name], value) for name, value in before.items())


def mine(monkeypatch):
    """A package of somebody else's, with a method."""
    package = types.ModuleType("mine.router")
    package.Mine = type("Mine", (Random,), {"__module__": "mine.router"})
    monkeypatch.setitem(sys.modules, "mine", types.ModuleType("mine"))
    monkeypatch.setitem(sys.modules, "mine.router", package)
    return package.Mine(sparsity=0.5)


def test_a_method_of_another_package_has_to_be_allowed(tmp_path, monkeypatch):
    model, method = small_model(), mine(monkeypatch)
    attach(model, method)
    options = {"sparsity": 0.5}
    save_pretrained(method, tmp_path, target="mine.router.Mine", options=options, base={})
    for allow in ((), ("min",), ("mine.other",)):
        with pytest.raises(BadCheckpoint, match="allow=mine loads what you trust"):
            from_pretrained(tmp_path, model, allow=allow)
    assert type(from_pretrained(tmp_path, model, allow=("mine",))) is type(method)


def test_other_weights_are_refused(saved):
    model, method, folder = saved
    base = {"weights_sha256": hash_model(model)}
    save_pretrained(method, folder, target="methods.informed.Informed", options=OPTIONS, base=base)
    assert from_pretrained(folder, model) is not None
    other = small_model().bfloat16()
    with pytest.raises(BadCheckpoint, match="was trained on weights"):
        from_pretrained(folder, other)
    assert from_pretrained(folder, other, check_weights=False) is not None
