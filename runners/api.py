"""What a notebook needs: load a saved routed model, route one of your own, compare methods.

from runners.api import load

model = load("results/<fingerprint>/routed")
model.generate("My fellow citizens,", max_new_tokens=20)
model.usage

Every function does what the commands do, on objects instead of folders: docs/python.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from omegaconf import OmegaConf

from methods.base import Method
from methods.engine.model import RoutedModel
from methods.engine.routed import Mode
from runners.base_model.load import Base, build_budget, load_base
from runners.base_model.saved import open_saved
from runners.corpus.rows import Texts, encoder
from runners.corpus.source import Document, load_documents
from runners.errors import UserError
from runners.evaluation.evaluate import evaluate
from runners.options import parse_section, unknown
from runners.point import check_reach, make_method
from runners.point_config import (
    CONF,
    BudgetConfig,
    DataConfig,
    Dtype,
    EvalConfig,
    MethodConfig,
    ModelConfig,
    PlacementConfig,
)
from runners.training.loop import Allowance, Loop, recipe
from runners.training.probe import ModelProbe

if TYPE_CHECKING:
    import pandas
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HELD_OUT = 4
"""Without calibration texts of their own, one of so many texts is calibrated on."""


def load(folder: Path | str, *, mode: Mode = "gathered", **options: Any) -> RoutedModel:
    """Load a saved routed model with its base, whose weights must be those of training.

    Args:
        folder: `routed/` of a point, or what `RoutedModel.save` wrote.
        mode: `gathered` computes only what is executed.
        options: `base_model`, `device`, `dtype`, `check_weights` and so on: see `open_saved`.

    Raises:
        UserError: a folder, model or value that cannot be used; other weights.
    """
    opened = open_saved(folder, **options)
    origin = {key: opened.settings[key] for key in ("target", "options", "base")}
    base = opened.base
    return RoutedModel(base.model, base.tokenizer, opened.method, mode=mode, origin=origin)


def base_model(
    name: str = "smollm2_135m", *, device: str = "auto", dtype: Dtype = "auto", seed: int = 0
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model of conf/model and its tokenizer; one of your own comes from `transformers`.

    Args:
        name: `smollm2_135m` (embedded), `tiny` (random weights, for a trial), ...

    Raises:
        UserError: no such file, or a model that cannot be loaded.
    """
    placement = PlacementConfig(device, dtype, None, None)
    base = load_base(parse_section(ModelConfig, _group("model", name)), placement, seed, None)
    return base.model, base.tokenizer


def read_texts(split: str = "train", **data: Any) -> list[str]:
    """Read the texts of a split: of a folder (`dir=`), else of the embedded addresses.

    Args:
        split: `train`, `calibration` or `test`.
        data: options of conf/data: `dir`, `text_field`, `documents_limit`, ...

    Raises:
        UserError: text that cannot be read.
    """
    documents = load_documents(parse_section(DataConfig, data, "data."), split)
    return [document.text for document in documents]


def fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    method: str | type[Method],
    texts: Sequence[str],
    *,
    sparsity: float,
    calibration: Sequence[str] | None = None,
    budget: str | Mapping[str, Any] = "quick",
    objective: Literal["lm", "distill"] = "distill",
    reserve: int = 1,
    seed: int = 0,
    mode: Mode = "gathered",
    **options: Any,
) -> RoutedModel:
    """Fit a method to a model, train it and calibrate it to a sparsity, as a point of a sweep does.

    Args:
        model: of a supported family. It is frozen and set to evaluation, and otherwise untouched.
        method: name of a file in conf/method, or a class of your own.
        texts: to fit and train on, each as long as you like.
        sparsity: that the calibration text is to realise.
        calibration: texts for that; None takes every fourth of `texts`, which then does not train.
        budget: name of a file in conf/budget, or what one holds.
        reserve: first tokens of every sequence that execute everything.
        options: of the method, before those of its file.

    Raises:
        UserError: an option, a target or a text that does not do.
    """
    asked = _method(method, options, seed)
    model.eval().requires_grad_(False)
    built = make_method(asked, sparsity, seed, model, reserve=reserve)
    check_reach(built, asked.name)
    spending = _budget(budget)
    spent = build_budget(spending)
    documents = _split(texts, calibration)
    cut = Texts(documents, encoder(tokenizer), spending.seq_len, seed, fit_tokens=spent.fit_tokens)
    probe = ModelProbe(model, built, cut.for_probe(spent))
    loop = Loop(model, built, probe, cut.rows, objective=objective, seed=seed)
    allowance, read = Allowance(spending.tokens, recipe(built, spent)), 0
    for stage in recipe(built, spent):
        read += loop.run(stage, allowance=allowance.of(stage, read)).tokens
    origin = {"target": asked.target, "options": {"sparsity": sparsity, **asked.options}}
    return RoutedModel(model, tokenizer, built, mode=mode, origin=origin)


def compare(
    models: Mapping[str, RoutedModel], texts: Sequence[str], *, tokens_per_text: int = 512
) -> pandas.DataFrame:
    """Measure routed models, and the dense one, on texts that none of them was fitted on.

    Args:
        models: by the name that the table gives them, all of one base.
        tokens_per_text: that are read of each.

    Returns:
        A row a model, the dense one first: realised sparsity, perplexity, over the dense one's
        (`ratio`), its 95 % interval over the texts, FLOPs and cache bytes over the dense one's.

    Raises:
        UserError: no model, models of several bases, no text of two tokens.
    """
    import pandas

    first = next(iter(models.values()), None)
    if first is None or any(other.model is not first.model for other in models.values()):
        raise UserError("compare needs one routed model or more, all of one base model")
    quick = _group("eval", "quick")
    quick["perplexity"] |= {"tokens_per_document": tokens_per_text, "windows_per_document": None}
    settings = parse_section(EvalConfig, {**quick, "tasks": []}, "eval.")
    base, documents = Base(first.model, first.tokenizer, "", "", None), _documents(texts)
    measure = partial(evaluate, settings, base, documents, data="texts", seed=0, cache_dir=Path())
    found = {"dense": measure()}
    found |= {name: measure(method=m.method, mode=m.mode) for name, m in models.items()}
    entries = {name: figures["perplexity"]["texts"] for name, figures in found.items()}
    rows = {
        name: {
            "sparsity": figures["sparsity_realised"],
            "perplexity": entries[name]["value"],
            "ratio": entries[name]["value"] / entries["dense"]["value"],
            "low": entries[name]["low"],
            "high": entries[name]["high"],
            "flops_ratio": figures["flops_ratio"],
            "kv_bytes_ratio": figures["kv_bytes_ratio"],
        }
        for name, figures in found.items()
    }
    return pandas.DataFrame.from_dict(rows, orient="index").rename_axis("method")


def _method(method: str | type[Method], options: Mapping[str, Any], seed: int) -> MethodConfig:
    if isinstance(method, str):
        found = _group("method", method, seed)
        name, target = found.pop("name"), found.pop("_target_")
        return MethodConfig(name, target, {**found, **options})
    target = f"{method.__module__}.{method.__qualname__}"
    return MethodConfig(method.__name__, target, dict(options))


def _budget(budget: str | Mapping[str, Any]) -> BudgetConfig:
    found = _group("budget", budget) if isinstance(budget, str) else budget
    return parse_section(BudgetConfig, found, "budget.").scaled


def _group(group: str, name: str, seed: int = 0) -> dict[str, Any]:
    """A file of conf/ as JSON types; the seed is all that one may ask of the whole config."""
    known = {path.stem: path for path in (CONF / group).glob("*.yaml")}
    if name not in known:
        raise unknown(group, name, known)
    whole = OmegaConf.create({"seed": seed, "group": OmegaConf.load(known[name])})
    found: Any = OmegaConf.to_container(whole, resolve=True)
    return {str(key): value for key, value in found["group"].items()}


def _split(texts: Sequence[str], calibration: Sequence[str] | None) -> dict[str, list[Document]]:
    if isinstance(texts, str) or isinstance(calibration, str):
        raise UserError("texts is a list of strings, one for each text")
    if calibration is None:
        if len(texts) < 2:
            raise UserError("one text cannot both train and calibrate: give calibration=[...] too")
        calibration = texts[1::HELD_OUT]
        texts = [text for index, text in enumerate(texts) if index % HELD_OUT != 1]
    return {"train": _documents(texts), "calibration": _documents(calibration), "test": []}


def _documents(texts: Sequence[str]) -> list[Document]:
    return [Document(f"text-{index}", text) for index, text in enumerate(texts, 1)]
