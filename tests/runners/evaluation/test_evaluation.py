"""Figures of a record on a model whose routing is known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from runners.base_model.load import Base
from runners.corpus.source import Document
from runners.evaluation import evaluate as evaluating
from runners.evaluation.evaluate import evaluate, evaluation_key
from runners.evaluation.perplexity import perplexity
from runners.point_config import WindowConfig
from tests.conftest import base_of, documents, eval_config
from tests.runners.toy import SITES, toy

TEXT = documents(5)


SIZES = {"context": 48, "stride": 48, "batch_size": 4}
SETTINGS = eval_config(perplexity={"documents_limit": 4, "tokens_per_document": 48, **SIZES})


def measured(base, texts, method=None, mode="gathered"):
    point = {"data": "mine", "seed": 0, "cache_dir": Path("unused")}
    return evaluate(SETTINGS, base, texts, method=method, mode=mode, **point)


def brute(base):
    return perplexity(base.model, base.tokenizer, TEXT[:4], WindowConfig(**SIZES), tokens=48)


@pytest.fixture
def base(tiny_llama, tokenizer):
    return Base(tiny_llama, tokenizer, "hash", "tiny", None)


def test_dense(base):
    found = measured(base, TEXT)
    own = brute(base)
    documents = own.pop("per_document")
    assert found["perplexity"] == {"mine": own}
    assert found["items"]["mine"]["values"] == [document["nll"] for document in documents]
    assert found["items"]["mine"]["weights"] == [document["tokens"] for document in documents]
    assert found["sparsity_realised"] == 0.0
    assert found["flops_ratio"] == 1.0
    assert found["accuracy"] == {}
    assert not hasattr(base.model, "routing")


def test_nothing_executed_at_two_of_eight_units(base):
    method = toy(base.model)
    method.threshold.fill_(float("inf"))
    found = measured(base, TEXT, method)
    assert found["sparsity_realised"] == pytest.approx(len(SITES) / 8)
    assert (found["realised"]["attention"], found["realised"]["mlp"]) == (0.0, 0.5)
    assert [layer["mlp"] for layer in found["realised"]["per_layer"]] == [0.0, 1.0, 1.0, 0.0]
    assert 0.0 < found["flops_ratio"] < 1.0
    with torch.no_grad():
        for site in SITES:
            mlp = base.model.model.layers[site.layer].mlp
            vector = method.vectors[site.key]
            mlp.register_forward_hook(lambda _, __, out, v=vector: v.expand_as(out))
        own = brute(base)
    assert found["perplexity"]["mine"]["value"] == pytest.approx(own["value"], rel=1e-5)
    assert own["value"] != pytest.approx(measured(base, TEXT[:2])["perplexity"]["mine"]["value"])


def test_all_executed_is_dense(base):
    """Bit for bit where the model's own modules run, else to float tolerance."""
    dense = measured(base, TEXT)
    masked = measured(base, TEXT, toy(base.model), "masked")
    assert masked["perplexity"] == dense["perplexity"]
    gathered = measured(base, TEXT, toy(base.model), "gathered")
    value = dense["perplexity"]["mine"]["value"]
    assert gathered["perplexity"]["mine"]["value"] == pytest.approx(value, rel=1e-6)
    assert masked["sparsity_realised"] == gathered["sparsity_realised"] == 0.0


def test_key(base, monkeypatch, tmp_path):
    """Libraries, their versions and the device may change scores as the text does."""
    point = {"data": "mine", "seed": 0, "cache_dir": tmp_path}

    def key(settings=SETTINGS, base=base, texts=TEXT, **changes):
        return evaluation_key(settings, base, texts, **{**point, **changes})

    before = key()
    assert key() == before
    others = [
        key(seed=5),
        key(eval_config(limit=9)),
        key(data="yours"),
        key(texts=[*TEXT[:-1], Document("doc-4", "other")]),
        key(base=Base(base.model, base.tokenizer, "else", "tiny", None)),
    ]
    monkeypatch.setattr(evaluating, "code_version", lambda *sources: "another")
    others.append(key())
    version = evaluating.metadata.version
    for library in ("lm_eval", "transformers", "torch"):
        monkeypatch.setattr(
            evaluating.metadata, "version", lambda n, own=library: "9" if n == own else version(n)
        )
        others.append(key())
    monkeypatch.setattr(evaluating, "input_device", lambda model: torch.device("meta"))
    others.append(key())
    assert len({before, *others}) == 11


def test_key_is_of_the_content_of_the_files_that_are_read(base, tmp_path):
    folder = tmp_path / "data" / "piqa"
    folder.mkdir(parents=True)
    settings = eval_config(tasks=["piqa"], data_dir=str(tmp_path / "data"))

    def key(text):
        (folder / "validation.jsonl").write_text(text)
        return evaluation_key(settings, base, TEXT, data="m", seed=0, cache_dir=tmp_path)

    first = key("one")
    assert key("two") != first
    assert key("one") == first
    assert (tmp_path / "hashes").is_dir()


def test_base_is_frozen_and_kept(tiny_config):
    config = tiny_config()
    first = base_of(config)
    assert base_of({**config, "sparsity": 0.9}) is first
    assert not first.model.training
    assert not any(p.requires_grad for p in first.model.parameters())
    other = base_of({**config, "seed": 1})
    assert other.weights_hash != first.weights_hash
