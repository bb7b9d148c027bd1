"""The phases of `benchmarks/gpu.py` that fit and train: what memory and seconds they take."""

from __future__ import annotations

import argparse
import functools
import importlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from methods.base import Budget, Method, StageBudget
from methods.engine.decoder.families import shape_of
from methods.engine.lora import attach_lora
from methods.engine.routed import attach, routed
from methods.parts.ridge import Moments, site_moments
from runners.base_model.synthetic import random_model
from runners.corpus.formats import texts_of
from runners.corpus.rows import ProbeText, Texts, encoder
from runners.corpus.source import Document
from runners.evaluation.perplexity import window_nlls, windows_of
from runners.runtime.memory import PeakMemory
from runners.training.loop import Loop, recipe
from runners.training.probe import ModelProbe

ROOT = Path(__file__).resolve().parents[1]
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "head_dim": 16}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1}
SPLITS = ("train", "calibration", "test")
METHODS = ("informed", "skipgpt", "router_tuning", "d_llm")
ROW = 2048 if ON_GPU else 32
"""Tokens of a row of drawn text."""
WINDOW = 1024 if ON_GPU else 32
"""Tokens of a test document that are scored, and of a window."""


@functools.lru_cache(maxsize=1)
def model_of(shape: str) -> Any:
    """Random weights at the sizes of a file of conf/model, bfloat16 on CUDA, or a tiny model."""
    sizes, dtype = TINY, torch.bfloat16 if ON_GPU else torch.float32
    if shape != "tiny":
        sizes = read_yaml("model", shape)["config"]
    model, _ = random_model(family="llama", sizes=sizes, seed=0, device=DEVICE, dtype=dtype)
    return model.requires_grad_(False)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `fit` and `recipe`."""
    parser.add_argument("--fit-tokens", type=int, default=16 * ROW, help="that `fit` reads")
    parser.add_argument("--model", help="of `recipe`: a folder with a Hugging Face model")
    parser.add_argument("--text", help="of `recipe`: a folder with train, calibration, test .jsonl")
    parser.add_argument("--budget", default="quick", help="of `recipe`: a file of conf/budget")
    parser.add_argument("--share", type=float, default=1.0, help="of its steps and tokens")
    parser.add_argument("--methods", nargs="+", default=METHODS, help="of `recipe`")
    parser.add_argument("--sparsities", nargs="+", type=float, default=(0.25, 0.4))


def check_arguments(parser: argparse.ArgumentParser, s: argparse.Namespace) -> None:
    """Refuse what names no file, before anything is measured."""
    for group, names in (("budget", [s.budget]), ("method", s.methods)):
        for name in names:
            if not (ROOT / "conf" / group / f"{name}.yaml").is_file():
                parser.error(f"no conf/{group}/{name}.yaml")
    if "recipe" not in s.phases or s.model is None:
        return
    if not Path(s.model, "config.json").is_file():
        parser.error(f"--model {s.model}: no config.json in it")
    missing = [name for name in SPLITS if not Path(s.text or "", f"{name}.jsonl").is_file()]
    if missing:
        parser.error(f"--text {s.text}: no {', '.join(f'{name}.jsonl' for name in missing)} in it")


def fit_cases(s: argparse.Namespace) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """The closed form of `informed` on random weights and text, stage by stage."""
    for dtype in (torch.float64, torch.float32):
        name = str(dtype).removeprefix("torch.")
        yield f"statistics in {name}", functools.partial(_statistics, s, dtype)
    yield "informed, without training", functools.partial(_fit, s)


def _statistics(s: argparse.Namespace, dtype: torch.dtype) -> dict[str, Any]:
    """Input and output moments of every unit, kept at once, and one unit's solution."""
    model, text = model_of(s.shape), drawn_text(s.fit_tokens)
    probe = ModelProbe(model, build("dense", 0.0, model), text)
    before, peak, began = _held(), PeakMemory(DEVICE), time.perf_counter()
    units = probe.shape.units()
    moments = site_moments(probe, lambda view: (view.x_ND, view.y_ND), units, dtype=dtype)
    seconds, kept = time.perf_counter() - began, _bytes(moments)
    began = time.perf_counter()
    first = next(iter(moments.values()))
    first.components(1e-3).take(min(100, shape_of(model.config).width // 4))
    return {
        "tokens": text.train.numel(),
        "seconds": seconds,
        "solve_one_unit_s": time.perf_counter() - began,
        "statistics_bytes": kept,
        "peak_beside_model_bytes": peak.bytes() - before,
    }


def _fit(s: argparse.Namespace) -> dict[str, Any]:
    model = model_of(s.shape)
    method = build("informed", 0.5, model, train="none")
    probe = ModelProbe(model, method, drawn_text(s.fit_tokens))
    return run_recipe(model, method, probe, lambda _: probe.text.train, read_budget("quick", 1.0))


def recipe_cases(s: argparse.Namespace) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Each method of `--methods` at each target: seconds of its stages, then perplexity."""
    if s.model is None and ON_GPU:
        yield "none", lambda: {"skipped": "give --model and --text"}
        return
    yield "dense", lambda: {"perplexity": _perplexity(*_base(s.model, s.text))}
    for name in s.methods:
        for sparsity in s.sparsities:
            yield f"{name} at {sparsity:g}", functools.partial(_recipe, s, name, sparsity)


def _recipe(s: argparse.Namespace, name: str, sparsity: float) -> dict[str, Any]:
    """Train one method for one target, alone: nothing is shared between the cases."""
    model, encode, documents = _base(s.model, s.text)
    budget = read_budget(s.budget, s.share)
    torch.manual_seed(0)
    method = build(name, sparsity, model, **({"targets": []} if name == "informed" else {}))
    row = read_yaml("budget", s.budget)["seq_len"]
    texts = Texts(documents, encode, row if ON_GPU else ROW, 0, fit_tokens=budget.fit_tokens)
    probe = ModelProbe(model, method, texts.for_probe(budget))
    found = run_recipe(model, method, probe, texts.rows, budget)
    with routed(model, method, "gathered"):
        found["perplexity"] = _perplexity(model, encode, documents)
        found["sparsity"] = model.routing.counters.read().sparsity()
    return found | {"budget": s.budget, "share": s.share}


def run_recipe(
    model: Any, method: Method, probe: ModelProbe, rows: Callable[..., Any], budget: Budget
) -> dict[str, Any]:
    """Run every stage; seconds, tokens and peak memory of each."""
    loop = Loop(model, method, probe, rows, objective="distill", seed=0)
    before, stages = _held(), []
    for stage in recipe(method, budget):
        if stage.lora is not None:
            attach_lora(model, method, stage.lora, seed=0)
        report = loop.run(stage)
        figures = {"planned_fit_bytes": stage.fit_bytes, **asdict(report)}
        figures["peak_beside_model_bytes"] = report.peak_memory_bytes - before
        stages.append(figures)
    return {"seconds": sum(stage["seconds"] for stage in stages), "stages": stages}


def build(name: str, sparsity: float, model: Any, **options: Any) -> Method:
    """A method of conf/method, attached."""
    given = {k: v for k, v in read_yaml("method", name).items() if k not in ("name", "_target_")}
    given = {k: 0 if v == "${seed}" else v for k, v in given.items()}
    module, kind = read_yaml("method", name)["_target_"].rsplit(".", 1)
    made = getattr(importlib.import_module(module), kind)(sparsity=sparsity, **given | options)
    attached: Method = attach(model, made).eval()
    return attached


def read_yaml(group: str, name: str) -> Any:
    """A file of conf, as it stands."""
    return yaml.safe_load((ROOT / "conf" / group / f"{name}.yaml").read_text())


def read_budget(name: str, share: float) -> Budget:
    """A file of conf/budget, its steps and tokens times `share`; rows as short as tiny text off
    CUDA."""
    given = read_yaml("budget", name)
    tokens = {k: max(ROW, round(v * share)) for k, v in given.items() if k.endswith("_tokens")}
    stages = {}
    for stage in ("forecasters", "routers", "lora"):
        whole = StageBudget(**given[stage])
        steps = max(1, round(whole.steps * share))
        stages[stage] = replace(whole, steps=steps if ON_GPU else min(steps, 2))
        if not ON_GPU:
            stages[stage] = replace(stages[stage], seq_len=ROW, batch_size=1)
    return Budget(name, **tokens, **stages)


def drawn_text(tokens: int) -> ProbeText:
    """Random tokens in rows."""
    rows = max(1, tokens // ROW)
    ids = torch.randint(3, 250, (rows, ROW), generator=torch.Generator().manual_seed(0))
    return ProbeText(train=ids, calibration=ids[: max(1, rows // 4)], sensitivity=ids[:1])


@functools.lru_cache(maxsize=1)
def _base(folder: str | None, text: str | None) -> tuple[Any, Any, dict[str, list[Document]]]:
    """Model, its tokens and the three splits; without a folder a tiny model and drawn text."""
    if folder is None:
        model, tokenizer = random_model(family="llama", sizes=TINY, seed=0)
        said = "the state of the union is as it was found. " * 40
        documents = {split: [Document(split, said)] for split in SPLITS}
    else:
        dtype = torch.bfloat16 if ON_GPU else torch.float32
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        files = {split: Path(text or "", f"{split}.jsonl") for split in SPLITS}
        documents = {
            split: [Document(f"{split}-{i}", said) for i, said in enumerate(texts_of(file, "text"))]
            for split, file in files.items()
        }
    return model.to(DEVICE).eval().requires_grad_(False), encoder(tokenizer), documents


def _perplexity(model: Any, encode: Any, documents: dict[str, list[Document]]) -> float:
    """Of the first tokens of each test document."""
    windows = []
    for index, document in enumerate(documents["test"]):
        ids = encode(document.text)[:WINDOW]
        windows += windows_of(ids, index, context=WINDOW, stride=WINDOW)
    nll = sum(sum(window_nlls(model, [window])) for window in windows)
    scored = sum(len(window.targets) for window in windows)
    return float(torch.tensor(nll / scored).exp())


def _held() -> int:
    """Bytes in use now."""
    return torch.cuda.memory_allocated() if ON_GPU else PeakMemory(DEVICE).bytes()


def _bytes(moments: dict[Any, Moments]) -> int:
    tensors = [t for m in moments.values() for t in vars(m).values() if isinstance(t, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)
