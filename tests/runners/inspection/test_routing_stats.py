"""What is recorded of a model whose routing is known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional

from analysis.cli import Paths
from analysis.frames import AnalysisError
from analysis.routing_maps import by_layer, coloured_text, executed_share, main, read
from methods.engine.routed import routed
from runners.base_model.load import Base
from runners.inspection.tables import CLASSES, routing_tables, token_classes, token_rows
from tests.conftest import documents
from tests.runners.toy import SITES, toy


@pytest.fixture
def base(tiny_llama, tokenizer):
    return Base(tiny_llama, tokenizer, "hash", "tiny", None)


@pytest.fixture
def tables(base):
    method = toy(base.model)
    method.threshold.fill_(0.0)
    rows = token_rows(base, documents(3), tokens=70, context=30)
    return method, rows, routing_tables(base, method, rows)


def test_rows_are_the_beginnings_of_documents(base):
    rows = token_rows(base, documents(3), tokens=70, context=30)
    assert [len(ids) for _, ids in rows] == [30, 30, 10]
    assert rows[1][1] == base.tokenizer(documents(3)[1].text)["input_ids"][:30]


def test_losses_are_those_of_the_dense_and_the_routed_model(base, tables):
    method, rows, found = tables
    name, ids = rows[0]
    own = found["tokens"][found["tokens"].row == name]
    batch = torch.tensor([ids])
    with torch.no_grad():
        dense = base.model(input_ids=batch).logits[0]
        with routed(base.model, method):
            sparse = base.model(input_ids=batch).logits[0]
    for column, logits in (("dense_loss", dense), ("routed_loss", sparse)):
        losses = functional.cross_entropy(logits[:-1], batch[0, 1:], reduction="none")
        assert own[column].to_numpy()[1:] == pytest.approx(losses.numpy(), abs=1e-4)
        assert np.isnan(own[column].to_numpy()[0])
    assert not np.allclose(own.dense_loss[1:], own.routed_loss[1:], atol=1e-3)


def test_decisions_and_errors(base, tables):
    method, rows, found = tables
    decisions = found["decisions"]
    assert len(decisions) == 70 * len(SITES)
    first = rows[0][1]
    captured: dict[int, torch.Tensor] = {}
    hooks = [
        layer.mlp.register_forward_hook(lambda _, __, out, i=i: captured.update({i: out[0]}))
        for i, layer in enumerate(base.model.model.layers)
    ]
    with torch.no_grad():
        base.model(input_ids=torch.tensor([first]))
    for hook in hooks:
        hook.remove()
    for site in SITES:
        y = captured[site.layer]
        forecast = method.vectors[site.key].expand_as(y)
        own = decisions[(decisions.layer == site.layer) & (decisions.token < len(first))]
        l2 = (forecast - y).norm(dim=-1) / y.norm(dim=-1)
        assert own.error_l2.to_numpy() == pytest.approx(l2.detach().numpy(), rel=1e-3)
        cosine = functional.cosine_similarity(forecast, y)
        assert own.error_cosine.to_numpy() == pytest.approx(cosine.detach().numpy(), abs=1e-3)
    assert (decisions.executed == (decisions.score > 0)).all()
    assert 0 < decisions.executed.mean() < 1


def test_the_stream_departs_behind_the_first_routed_layer(tables):
    depth = tables[2]["depth"]
    assert depth.layer.tolist() == [0, 1, 2, 3]
    assert depth.l2[0] == pytest.approx(0.0, abs=1e-6)
    assert (depth.l2[1:] > 1e-3).all()
    assert depth.cosine[0] == pytest.approx(1.0, abs=1e-5)


def test_how_large_the_first_token_of_a_row_is(base, tables):
    _, rows, found = tables
    squares = torch.zeros(4)
    for _, ids in rows:
        with torch.no_grad():
            states = base.model(input_ids=torch.tensor([ids]), output_hidden_states=True)
        # the last of these is normed: the layers before it leave what the next one is given
        first = torch.stack([state[0, 0] for state in states.hidden_states[1:4]])
        squares[:3] += first.square().mean(-1).sqrt() * len(ids) / 70
    depth = found["depth"]
    assert depth.first_rms_dense[:3].to_numpy() == pytest.approx(squares[:3].numpy(), rel=1e-4)
    assert depth.first_rms_routed[0] == pytest.approx(depth.first_rms_dense[0])


def test_frequency_and_position(tables):
    tokens = tables[2]["tokens"]
    counts = tokens["id"].value_counts() / len(tokens)
    assert tokens.frequency.to_numpy() == pytest.approx(tokens["id"].map(counts).to_numpy())
    assert tokens.groupby("row").position.max().tolist() == [29, 29, 9]


def test_token_classes():
    texts = ["The", " king", " of", " France", ",", " re", "ign", "ed", " 42", " years", ".", "\n"]
    texts += [" Then", " Louis"]
    expected = "function content function name punctuation content continuation continuation "
    expected += "number content punctuation space function name"
    assert token_classes(texts) == expected.split()
    assert set(expected.split()) == set(CLASSES)


@pytest.fixture
def inspected(tables, tmp_path):
    folder = tmp_path / "abc" / "routing"
    folder.mkdir(parents=True)
    for name, table in tables[2].items():
        table.to_parquet(folder / f"{name}.parquet")
    return tmp_path


def test_maps_are_means_over_the_tokens_of_a_bin(inspected):
    tokens, decisions, _ = read(inspected / "abc" / "routing")
    table = executed_share(tokens, decisions, "token_class")
    merged = decisions.merge(tokens[["token", "token_class"]], on="token")
    for (kind, layer), row in table.iterrows():
        part = merged[(merged.kind == kind) & (merged.layer == layer)]
        for name, value in row.items():
            assert value == pytest.approx(part[part.token_class == name].executed.mean())
    for view in ("position", "frequency", "dense_loss"):
        assert executed_share(tokens, decisions, view).shape[1] > 1
    layers = by_layer(decisions)
    assert layers.executed.mean() == pytest.approx(decisions.executed.mean())


def test_pictures_and_text(inspected):
    main(Paths(inspected, inspected / "plots"))
    written = {path.name: path.stat().st_size for path in (inspected / "plots").iterdir()}
    stems = {f"routing-abc-{name}.{end}" for name in ("maps", "errors") for end in ("png", "pdf")}
    tables = {f"routing-abc-layers.{end}" for end in ("csv", "md", "tex")}
    assert set(written) == stems | tables | {"routing-abc-text.html"}
    assert all(size > 100 for size in written.values())


def test_text_is_escaped_and_the_prompt_comes_alone():
    tokens = pd.DataFrame(
        {
            "token": [0, 1, 2],
            "row": ["doc", "prompt", "prompt"],
            "text": ["other", "<b>", " & more"],
            "dense_loss": [1.0, float("nan"), 2.0],
            "routed_loss": [1.0, float("nan"), 2.5],
        }
    )
    decisions = pd.DataFrame(
        {"token": [0, 1, 2], "kind": "mlp", "executed": [True, False, True], "layer": 0}
    )
    text = coloured_text(tokens, decisions, title="<title>")
    assert "&lt;b&gt;" in text and " &amp; more" in text and "<b>" not in text
    assert "other" not in text and "&lt;title&gt;" in text
    assert "mlp 100%; loss 2.00, routed +0.50" in text


def test_nothing_inspected_is_one_line(tmp_path):
    with pytest.raises(AnalysisError, match=r"run runners/inspect_routing\.py first"):
        main(Paths(tmp_path, tmp_path))
