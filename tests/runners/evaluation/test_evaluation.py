"""Figures of a record on a model whose routing is known."""

from __future__ import annotations

import pytest
import torch

from runners.base_model.load import Base
from runners.corpus.source import Document
from runners.evaluation.evaluate import evaluate, evaluation_key
from runners.evaluation.perplexity import perplexity
from tests.conftest import base_of, documents
from tests.runners.toy import SITES, toy

TEXT = documents(5)


@pytest.fixture
def config(tiny_config):
    return tiny_config("data.name=mine")


@pytest.fixture
def base(tiny_llama, tokenizer):
    return Base(tiny_llama, tokenizer, "hash", "tiny", None)


def test_dense(config, base):
    found = evaluate(config, base, TEXT)
    own = perplexity(base.model, base.tokenizer, TEXT, **config["eval"]["perplexity"])
    documents = own.pop("per_document")
    assert found["perplexity"] == {"mine": own}
    assert found["items"]["mine"]["values"] == [document["nll"] for document in documents]
    assert found["items"]["mine"]["weights"] == [document["tokens"] for document in documents]
    assert found["sparsity_realised"] == 0.0
    assert found["flops_ratio"] == 1.0
    assert found["accuracy"] == {}
    assert not hasattr(base.model, "routing")


def test_nothing_executed_at_two_of_eight_units(config, base):
    method = toy(base.model)
    method.threshold.fill_(float("inf"))
    found = evaluate(config, base, TEXT, method)
    assert found["sparsity_realised"] == pytest.approx(len(SITES) / 8)
    assert (found["realised"]["attention"], found["realised"]["mlp"]) == (0.0, 0.5)
    assert [layer["mlp"] for layer in found["realised"]["per_layer"]] == [0.0, 1.0, 1.0, 0.0]
    assert 0.0 < found["flops_ratio"] < 1.0
    with torch.no_grad():
        for site in SITES:
            mlp = base.model.model.layers[site.layer].mlp
            vector = method.vectors[site.key]
            mlp.register_forward_hook(lambda _, __, out, v=vector: v.expand_as(out))
        own = perplexity(base.model, base.tokenizer, TEXT, **config["eval"]["perplexity"])
    assert found["perplexity"]["mine"]["value"] == pytest.approx(own["value"], rel=1e-5)
    assert own["value"] != pytest.approx(
        evaluate(config, base, TEXT[:2])["perplexity"]["mine"]["value"]
    )


def test_all_executed_is_dense(config, base):
    """Bit for bit where the model's own modules run, else to float tolerance."""
    dense = evaluate(config, base, TEXT)
    masked = evaluate({**config, "mode": "masked"}, base, TEXT, toy(base.model))
    assert masked["perplexity"] == dense["perplexity"]
    gathered = evaluate({**config, "mode": "gathered"}, base, TEXT, toy(base.model))
    value = dense["perplexity"]["mine"]["value"]
    assert gathered["perplexity"]["mine"]["value"] == pytest.approx(value, rel=1e-6)
    assert masked["sparsity_realised"] == gathered["sparsity_realised"] == 0.0


def test_key(config, base, monkeypatch):
    before = evaluation_key(config, base, TEXT)
    assert evaluation_key({**config, "sparsity": 0.9, "force": True}, base, TEXT) == before
    others = [
        evaluation_key({**config, "seed": 5}, base, TEXT),
        evaluation_key({**config, "eval": {**config["eval"], "limit": 9}}, base, TEXT),
        evaluation_key({**config, "data": {"name": "yours"}}, base, TEXT),
        evaluation_key(config, base, [*TEXT[:-1], Document("doc-4", "other")]),
        evaluation_key(config, Base(base.model, base.tokenizer, "else", "tiny", None), TEXT),
    ]
    monkeypatch.setattr("runners.evaluation.evaluate.code_version", lambda *sources: "another")
    others.append(evaluation_key(config, base, TEXT))
    assert len({before, *others}) == 7


def test_base_is_frozen_and_kept(tiny_config):
    config = tiny_config()
    first = base_of(config)
    assert base_of({**config, "sparsity": 0.9}) is first
    assert not first.model.training
    assert not any(p.requires_grad for p in first.model.parameters())
    other = base_of({**config, "seed": 1})
    assert other.weights_hash != first.weights_hash
