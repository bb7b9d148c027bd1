"""The Python API, and its pages run as a user reads them."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType

import pandas as pd
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from methods import RoutedModel, attach, routed
from methods.base import Method
from methods.random import Random
from runners import api
from runners.api import base_model, compare, fit, load, read_texts
from runners.base_model.synthetic import tiny_model
from runners.errors import UserError
from tests.conftest import CONF, ROOT, documents

TEXTS = [document.text for document in documents(24)]
HELD_OUT = [document.text for document in documents(4, first=100)]
STAGE = {"steps": 3, "batch_size": 2, "seq_len": 32, "accumulate": 1}
BUDGET = {
    "name": "mini",
    "seq_len": 64,
    "fit_tokens": 1024,
    "calibration_tokens": 2048,
    "sensitivity_tokens": 128,
    **dict.fromkeys(("forecasters", "routers", "lora"), STAGE),
}
CODE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


class TokenNorm(Method):
    """A method of a user."""

    def route(self, site, x_BTD, ctx):
        return self.decide(ctx.residual_BTD.float().norm(dim=-1))


@pytest.fixture
def mine(tmp_path):
    """A model as a user loads it: from a folder, in float32, with gradients."""
    model, tokenizer = tiny_model(seed=3)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "my-llama")
    return (
        AutoModelForCausalLM.from_pretrained(tmp_path / "my-llama"),
        AutoTokenizer.from_pretrained(tmp_path / "my-llama"),
    )


@pytest.fixture
def page(monkeypatch) -> Iterator[ModuleType]:
    """A module as a notebook is one: what classes of it are imported from."""
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    yield module


def test_fit_spends_what_the_budget_says(mine, caplog):
    """As a sweep does: `scale` times the steps, and steps until `tokens` are read in all."""

    def read(**more):
        caplog.clear()
        asked = {"train": "routers", "start": "published", "lora": None}
        with caplog.at_level(logging.INFO, "runners.training.loop"):
            fit(*mine, "skipgpt", TEXTS, sparsity=0.25, budget={**BUDGET, **more}, **asked)
        return int(re.search(r"stage routers: .*?, (\d+) tokens", caplog.text)[1])

    step, plain = STAGE["batch_size"] * STAGE["seq_len"], read()
    assert read(scale=3.0) - plain == 2 * STAGE["steps"] * step
    assert 4096 - step < read(tokens=4096) <= 4096


def test_fit_calibrates_on_the_texts_that_it_holds_out(mine):
    model = fit(*mine, "greedy", TEXTS, sparsity=0.4, budget=BUDGET)
    for text in TEXTS[1::4]:
        model.generate(text, max_new_tokens=1)
        assert re.fullmatch(
            r"sparsity 0\.\d{3} \(attention 0\.\d{3}, mlp 0\.\d{3}\) over \d+ tokens",
            repr(model.usage),
        )
    given = fit(*mine, TokenNorm, TEXTS, sparsity=0.4, budget=BUDGET, calibration=HELD_OUT)
    ids = torch.cat(
        [given.tokenizer(t, return_tensors="pt")["input_ids"][:, :64] for t in HELD_OUT]
    )
    given(input_ids=ids)
    assert given.usage.sparsity() == pytest.approx(0.4, abs=0.05)
    assert "TokenNorm(sparsity=0.4), gathered, last call: sparsity 0." in repr(given)


def test_a_saved_model_comes_back_with_its_base(mine, tmp_path):
    made = fit(*mine, "informed", TEXTS, sparsity=0.4, budget=BUDGET, rank=8)
    loaded = load(made.save(tmp_path / "routed"))
    assert loaded.mode == "gathered" and loaded.model is not made.model
    ids = made.tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    assert torch.equal(loaded(ids).logits, made(ids).logits)
    assert loaded.usage.sparsity() == made.usage.sparsity() > 0.1


def test_a_base_of_other_weights_or_another_dtype_is_refused(mine, tmp_path):
    folder = fit(*mine, TokenNorm, TEXTS, sparsity=0.4, budget=BUDGET).save(tmp_path / "routed")
    where = {"base_model": str(tmp_path / "other"), "trust_method": True}
    other, tokenizer = tiny_model(seed=4)
    for part in (other, tokenizer):
        part.save_pretrained(tmp_path / "other")
    for wrong in (where, {"dtype": "bfloat16", "trust_method": True}):
        with pytest.raises(
            UserError, match=r"was trained on weights .*check_weights=false"
        ) as said:
            load(folder, **wrong)
        assert "\n" not in str(said.value)
        assert (
            load(folder, **wrong, check_weights=False).generate("a", max_new_tokens=1) is not None
        )


def test_generate_is_hugging_faces_and_leaves_the_model_untouched(mine):
    """One text, several of different lengths, and token ids: the same new tokens."""
    llm, tokenizer = mine
    model = fit(llm, tokenizer, "greedy", TEXTS, sparsity=0.4, budget=BUDGET)
    prompts = ["the people of this union", "trade law"]
    options = {"max_new_tokens": 6, "do_sample": False}
    alone = [model.generate(prompt, **options) for prompt in prompts]
    assert model.generate(prompts, **options) == alone
    assert not hasattr(llm, "routing")
    ids = tokenizer(prompts[0], return_tensors="pt")["input_ids"]
    with routed(llm, model.method, "masked") as hf:
        expected = hf.generate(input_ids=ids, **options)
    assert torch.equal(model.generate(input_ids=ids, **options), expected)
    assert tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True) == alone[0]
    tokenizer.pad_token = None
    assert model.generate(prompts, **options) == alone, "a tokenizer without a pad token"


@pytest.mark.parametrize("mode", ["masked", "gathered"])
def test_a_method_that_was_never_calibrated_says_so_once(mine, mode, caplog):
    caplog.set_level(logging.WARNING)
    llm, tokenizer = mine
    ids = tokenizer("the people", return_tensors="pt")["input_ids"]
    with routed(llm, attach(llm, Random(sparsity=0.5)), mode) as model:
        model(ids)
        model(ids)
    assert [r.getMessage().split(":")[0] for r in caplog.records] == ["Random was never calibrated"]
    caplog.clear()
    with routed(llm, attach(llm, Random(sparsity=0.0)), mode) as model:
        model(ids)
    fit(llm, tokenizer, "random", TEXTS, sparsity=0.4, budget=BUDGET).generate("the people")
    assert not caplog.records


def test_compare_is_the_perplexity_of_each(mine):
    models = {
        name: fit(*mine, name, TEXTS, sparsity=0.4, budget=BUDGET) for name in ("greedy", "random")
    }
    table = compare(models, HELD_OUT, tokens_per_text=100)
    assert isinstance(table, pd.DataFrame) and list(table.index) == ["dense", "greedy", "random"]
    assert table.sparsity["dense"] == 0 and table.ratio["dense"] == 1
    tokenizer = mine[1]
    nll, tokens = 0.0, 0
    for text in HELD_OUT:
        ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :100]
        nll += float(models["greedy"](ids, labels=ids).loss) * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    expected = torch.tensor(nll / tokens).exp().item()
    assert table.perplexity["greedy"] == pytest.approx(expected, rel=1e-4)
    assert table.low["greedy"] <= table.perplexity["greedy"] <= table.high["greedy"]


def test_mistakes_are_one_line(mine):
    llm, tokenizer = mine
    cases = [
        (
            (llm, tokenizer, "informd", TEXTS),
            {},
            r"unknown method 'informd' \(did you mean informed",
        ),
        ((llm, tokenizer, "informed", TEXTS), {"rnk": 3}, r"unknown option 'method\.rnk'"),
        ((llm, tokenizer, "informed", TEXTS[:1]), {}, "cannot both train and calibrate"),
        ((llm, tokenizer, "informed", TEXTS[0]), {}, "a list of strings"),
        ((llm, tokenizer, "informed", ["a", "b"]), {}, "too few tokens"),
        ((llm, tokenizer, "informed", TEXTS), {"budget": "qick"}, r"unknown budget 'qick'"),
    ]
    for words, options, said in cases:
        with pytest.raises(UserError, match=said) as caught:
            fit(*words, **{"sparsity": 0.4, "budget": BUDGET, **options})
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="one base model"):
        compare({}, TEXTS)
    with pytest.raises(UserError, match="holds no saved routed model"):
        load("nowhere")
    with pytest.raises(ValueError, match="origin is missing"):
        RoutedModel(llm, tokenizer, Random(sparsity=0.5)).save("nowhere")


def test_a_model_and_texts_without_a_network():
    model, tokenizer = base_model("tiny")
    assert tokenizer("a")["input_ids"] and model.config.num_hidden_layers == 4
    assert len(read_texts("test")) > 10 and read_texts("train", documents_limit=2)[1]


def test_methods_imports_nothing_heavy():
    code = "import sys, methods; assert not {'torch', 'transformers'} & set(sys.modules); "
    code += "from methods import RoutedModel, attach, from_pretrained, routed, save_pretrained"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("name", ["docs/python.md", "README.md"])
def test_the_page_runs_as_it_stands(name, mine, page, tmp_path, monkeypatch, capsys):
    """Every code block in order, but for the reader's folders and a budget of the tiny model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(api, "read_texts", lambda split: [t[:2000] for t in read_texts(split)[:8]])
    fit(*mine, "informed", TEXTS, sparsity=0.5, budget=BUDGET).save("results/1/routed")
    blocks = CODE.findall((ROOT / name).read_text())
    assert blocks
    for block in blocks:
        code = block.replace("<fingerprint>", "1")
        code = re.sub(r"(fit\(.*sparsity=[\d.]+)\)", rf"\1, budget={BUDGET})", code)
        exec(compile(code, name, "exec"), page.__dict__)
    assert "sparsity 0." in capsys.readouterr().out


def test_the_quick_budget_is_the_default(mine, monkeypatch):
    asked = []
    monkeypatch.setattr("runners.api.build_budget", asked.append)
    with pytest.raises(AttributeError):
        fit(*mine, "greedy", TEXTS, sparsity=0.4)
    quick = yaml.safe_load((CONF / "budget" / "quick.yaml").read_text())
    assert asked[0].name == "quick" and asked[0].fit_tokens == quick["fit_tokens"]
