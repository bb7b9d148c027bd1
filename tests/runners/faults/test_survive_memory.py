"""Allocations that really fail (a limit on the address space): parts, and the same numbers."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from methods.engine.routed import routed
from runners.evaluation.harness import HarnessModel
from runners.evaluation.perplexity import perplexity
from runners.point_config import WindowConfig
from runners.runtime.memory import free_memory
from tests.conftest import SHRUNK, documents, token_rows
from tests.nursery import Step
from tests.runners.toy import toy

BUDGET = "budget.routers={steps:2,batch_size:128,seq_len:256,accumulate:2}"
METHOD = ("method=router_tuning_published", "method.training.lr=1e-3", "sparsity=0.2")
"""Its gates draw no noise, which would differ from part to part; its penalty bends."""
WORDS = (*SHRUNK, "tracking=off", *METHOD, "checkpoint_seconds=0", BUDGET)


def words(folder: Path) -> list[str]:
    return [*WORDS, f"results_dir={folder / 'results'}", f"cache_dir={folder / 'cache'}"]


def record(folder: Path) -> dict:
    (file,) = folder.glob("results/*/result.json")
    return json.loads(file.read_bytes())


@pytest.mark.slow
def test_a_stage_goes_on_with_smaller_parts(nursery, tmp_path):
    """The record says so; batch and accumulation are as they were."""
    assert nursery.run(Step(words(tmp_path / "calm"))).code() == 0
    run = nursery.run(Step(words(tmp_path / "tight"), spare_mib=250))
    assert run.code() == 0, run.said
    assert "out of memory; micro-batch now" in run.said
    calm, tight = record(tmp_path / "calm"), record(tmp_path / "tight")
    whole, parts = (next(s for s in r["stages"] if s["steps"]) for r in (calm, tight))
    assert (whole["micro_batch"], whole["oom_halvings"]) == (128, 0)
    assert parts["oom_halvings"] >= 1
    assert parts["micro_batch"] == 128 >> parts["oom_halvings"]
    assert parts["tokens"] == whole["tokens"]
    assert parts["final_loss"] == pytest.approx(whole["final_loss"], rel=1e-5)
    for name, entry in calm["perplexity"].items():
        assert tight["perplexity"][name]["value"] == pytest.approx(entry["value"], rel=1e-3)
    assert tight["threshold"] == pytest.approx(calm["threshold"], abs=1e-3)


@contextmanager
def spare(mib: int) -> Iterator[None]:
    """At most so much more address space than now."""
    free_memory()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + mib * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


REQUESTS = [
    (None, token_rows(1, length, seed=length)[0].tolist(), [5, 6 + length % 3])
    for length in range(1000, 1064)
]


DENSE = pytest.param(False, id="dense", marks=pytest.mark.slow)


@pytest.fixture(params=[DENSE, pytest.param(True, id="routed")])
def model(tiny_llama, request):
    if not request.param:
        yield tiny_llama
        return
    method = toy(tiny_llama)
    method.threshold.fill_(0.0)
    with routed(tiny_llama, method) as model:
        yield model


def tokens_of(model) -> int:
    """Counted since the last look."""
    if getattr(model, "routing", None) is None:
        return 0
    tokens = model.routing.counters.read().tokens
    model.routing.reset_counters()
    return int(tokens)


@pytest.mark.parametrize("share", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_log_likelihoods(model, tokenizer, share):
    def score():
        harness = HarnessModel(model, tokenizer, batch_size=64, share_contexts=share)
        found = harness._loglikelihood_tokens(REQUESTS)
        return found, tokens_of(model), harness.oom_halvings

    whole, counted, halvings = score()
    assert halvings == 0
    with spare(150):
        parts, again, halvings = score()
    assert halvings > 0
    assert [s for s, _ in parts] == pytest.approx([s for s, _ in whole], abs=1e-3)
    assert again == counted


@pytest.mark.slow  # 25 MB less is felt only if earlier tests left no free memory in the process
def test_many_continuations_of_one_context(model, tokenizer):
    """A group that does not fit is scored one continuation at a time."""
    context = token_rows(1, 1500)[0].tolist()
    requests = [(None, context, [3 + end, 4, 5]) for end in range(100)]

    def score():
        harness = HarnessModel(model, tokenizer, batch_size=100, share_contexts=True)
        return harness._loglikelihood_tokens(requests), harness.oom_halvings

    whole, halvings = score()
    assert halvings == 0
    with spare(25):
        parts, halvings = score()
    assert halvings > 0
    assert [s for s, _ in parts] == pytest.approx([s for s, _ in whole], abs=1e-3)


def test_generation(model, tokenizer):
    texts = [" ".join(f"{word}" for word in range(i, i + 250 + i)) for i in range(48)]
    until = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}

    def generate():
        harness = HarnessModel(model, tokenizer, batch_size=48)
        requests = [SimpleNamespace(args=(text, dict(until))) for text in texts]
        found = harness.generate_until(requests, disable_tqdm=True)
        return found, harness.generated_tokens, tokens_of(model), harness.oom_halvings

    *whole, halvings = generate()
    assert halvings == 0
    with spare(120):
        *parts, halvings = generate()
    assert halvings > 0
    assert parts == whole


@pytest.mark.slow
def test_perplexity(tiny_llama, tokenizer):
    def measure():
        sizes = WindowConfig(1024, 1024, batch_size=64)
        return perplexity(tiny_llama, tokenizer, documents(120), sizes, joined=True)

    whole = measure()
    with spare(40):
        parts = measure()
    assert (whole["oom_halvings"], parts["oom_halvings"] > 0) == (0, True)
    assert parts["value"] == pytest.approx(whole["value"], rel=1e-5)


def test_memory_comes_back(tiny_llama):
    """The limit of a test above does not outlive it."""
    assert torch.zeros(2**27).numel() == 2**27
