"""Measure on a GPU what a CPU cannot tell, phase by phase, each figure written as it is found.

python benchmarks/gpu.py --out gpu
python benchmarks/gpu.py --out gpu --phases recipe --model <folder> --text <folder>

Needs Python, torch, transformers and triton, nothing else of this project's dependencies and no
network. Phases, each at most `--minutes`:

kernels: every Triton kernel against its PyTorch reference, then its time; tiles that were tuned
prefill: dense and routed in turn, random decisions, the FLOPs bound beside it; static bypass too
decode: the same with and without CUDA graphs, the bound of the bytes read
parts: the ten operations that take the most time of a routed pass
memory: peak of a dense and a routed pass, what the cache holds
fit: a closed-form fit and a calibration: seconds, memory of the statistics in both precisions
recipe: forecasters, routers and LoRA of several methods on a model of yours, perplexity of each

A phase that runs again goes on where it stopped. Without CUDA all of it runs at tiny sizes, to see
that it works; its times then mean nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # run the code of this clone, whichever clone's environment it is
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import functools
import itertools
import json
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
import transformers

import benchmarks.gpu_training as gpu_training
import benchmarks.kernels as kernels
from benchmarks.gpu_training import DEVICE, ON_GPU, build, model_of
from methods.base import LinearUnit, Method, Site
from methods.engine.ops.choose import interpreting
from methods.engine.routed import attach
from methods.parts.forecaster import Forecasters
from methods.parts.routed_method import RoutedMethod
from methods.parts.routers import Routers
from runners.runtime.memory import attempt, free_memory
from runners.store.files import write_json_atomic
from runners.timing.bench import Bench, RandomDraw

Case = tuple[str, Callable[[], dict[str, Any]]]
"""A name that is unique in its phase, and what measures it."""

KERNELS = {"decode 1 x 4096": ["--tokens=1", "--past=4096"], "decode 16 x 4096": ["--tokens=1"]}
KERNELS["decode 16 x 4096"] += ["--past=4096", "--batch=16"]
KERNELS |= {"prefill 1 x 2048": ["--tokens=2048"], "prefill 8 x 2048": ["--batch=8"]}
TINY_KERNELS = ["--batch=2", "--width=32", "--mlp-width=48", "--heads=4", "--kv-heads=2"]
TINY_KERNELS += ["--head-dim=16", "--rank=8"]
SPARSITIES = (0.0, 0.3, 0.5, 0.7) if ON_GPU else (0.0, 0.5)
PROMPTS, BATCHES = ((2048, 8192), (1, 8)) if ON_GPU else ((16, 24), (1, 2))
CACHES, STREAMS = ((512, 4096, 16384), (1, 4, 16)) if ON_GPU else ((8, 12), (1, 2))
STEPS = 16 if ON_GPU else 2
ROUNDS = {"warmup": 2, "repeats": 7} if ON_GPU else {"warmup": 0, "repeats": 1}
LARGEST = 10
"""Operations that `parts` lists."""


class StaticBypass(RoutedMethod):
    """Bypass evenly spread units for every token, with low-rank estimates."""

    def __init__(self, *, sparsity: float, rank: int) -> None:
        super().__init__(sparsity=sparsity, routers=Routers(), forecasters=Forecasters(rank=rank))

    def linear(self, site: Site) -> LinearUnit | None:
        return self.linear_unit(site)

    def fixed(self) -> Mapping[Site, bool]:
        assert self.shape is not None
        units, share = self.shape.units(), self.sparsity
        return {unit: int((i + 1) * share) == int(i * share) for i, unit in enumerate(units)}

    def estimated(self) -> Collection[Site]:
        return [site for site, runs in self.fixed().items() if not runs]


def kernel_cases(s: argparse.Namespace) -> Iterator[Case]:
    """Every kernel at the sizes of a layer of Llama-3.1-8B, in bfloat16."""
    if not (ON_GPU or interpreting()):
        yield "none", lambda: {"skipped": "needs CUDA, or TRITON_INTERPRET=1"}
        return
    shapes = (
        KERNELS if ON_GPU else {"decode": ["--tokens=1", "--past=9"], "prefill": ["--tokens=6"]}
    )
    for shape, words in shapes.items():
        sizes = kernels.sizes_parser().parse_args([*words, *(() if ON_GPU else TINY_KERNELS)])
        layer = functools.cache(functools.partial(kernels.Layer, sizes))
        for share in kernels.SHARES if ON_GPU else kernels.SHARES[1:2]:
            for place, name in enumerate(kernels.NAMES):

                def run(layer: Any = layer, share: float = share, place: int = place) -> Any:
                    torch.manual_seed(place)
                    with torch.inference_mode():
                        return kernels.measure(layer().cases(share)[place], layer())

                yield f"{shape}, {share:g} executed: {name}", run
    yield "tiles", lambda: {"tuned": kernels.tuned()}


def prefill_cases(s: argparse.Namespace) -> Iterator[Case]:
    """A whole prompt, logits of its last token."""
    for share, tokens, batch in itertools.product(SPARSITIES, PROMPTS, BATCHES):
        run = functools.partial(lambda *a: bench(s, a[0]).prefill(*a[1:]), share, tokens, batch)
        yield f"routed {share:g}, {batch} x {tokens}", run
    for share, tokens in itertools.product(SPARSITIES[1:], PROMPTS):
        run = functools.partial(lambda *a: static_bench(s, a[0]).prefill(*a[1:]), share, tokens, 1)
        yield f"static {share:g}, 1 x {tokens}", run


def decode_cases(s: argparse.Namespace) -> Iterator[Case]:
    """A few tokens after a full cache; the static bypass at batch 1."""
    graphs = (False, True) if ON_GPU else (False,)
    for graph, share, batch, cache in itertools.product(graphs, SPARSITIES, STREAMS, CACHES):

        def run(graph: bool = graph, share: float = share, size: Any = (cache, batch)) -> Any:
            return bench(s, share, graphs=graph).decode(*size, STEPS)

        how = "graph" if graph else "eager"
        yield f"routed {share:g}, {batch} x {cache}, {how}", run
    for graph, share in itertools.product(graphs, SPARSITIES[1:]):

        def static(graph: bool = graph, share: float = share) -> Any:
            return static_bench(s, share, graphs=graph).decode(CACHES[0], 1, STEPS)

        yield f"static {share:g}, 1 x {CACHES[0]}, {'graph' if graph else 'eager'}", static


def part_cases(s: argparse.Namespace) -> Iterator[Case]:
    """Time by operation at sparsity 0.5."""
    for name, tokens in (("prefill", PROMPTS[0]), ("decode", 1)):
        yield f"{name} 1 x {tokens}", functools.partial(largest_parts, s, tokens)


def memory_cases(s: argparse.Namespace) -> Iterator[Case]:
    """Peak memory at sparsity 0.5, each pass once."""
    once = {"warmup": 0, "repeats": 1}
    for tokens, batch in itertools.product(PROMPTS, BATCHES):

        def prefill(size: Any = (tokens, batch)) -> Any:
            return _memory(bench(s, 0.5, **once).prefill(*size))

        yield f"prefill {batch} x {tokens}", prefill
    for batch, cache in itertools.product(STREAMS, CACHES):

        def decode(size: Any = (cache, batch)) -> Any:
            return _memory(bench(s, 0.5, **once).decode(*size, STEPS))

        yield f"decode {batch} x {cache}", decode


PHASES: dict[str, Callable[[argparse.Namespace], Iterator[Case]]] = {
    "kernels": kernel_cases,
    "prefill": prefill_cases,
    "decode": decode_cases,
    "parts": part_cases,
    "memory": memory_cases,
    "fit": gpu_training.fit_cases,
    "recipe": gpu_training.recipe_cases,
}


def bench(s: argparse.Namespace, sparsity: float, **options: Any) -> Bench:
    """Random decisions: they cost what trained ones do."""
    model = model_of(s.shape)
    method = build("informed", sparsity, model, rank=_rank(model))
    return _bench(model, method, RandomDraw(sparsity, 1.0, 0, DEVICE), **options)


def static_bench(s: argparse.Namespace, sparsity: float, **options: Any) -> Bench:
    """No router at all."""
    model = model_of(s.shape)
    method = attach(model, StaticBypass(sparsity=sparsity, rank=_rank(model))).eval()
    return _bench(model, method, None, **options)


def _bench(model: Any, method: Method, draw: Any, **options: Any) -> Bench:
    longest = max(max(PROMPTS), max(CACHES) + STEPS)
    rows = max(*BATCHES, *STREAMS)
    ids = torch.randint(3, 250, (rows, longest), generator=torch.Generator().manual_seed(0))
    return Bench(model, method, ids, draw=draw, **{**ROUNDS, **options})


def _rank(model: Any) -> int:
    return min(100, model.config.hidden_size // 4)  # arXiv 2510.13831: 100 at D = 4096


def _memory(case: dict[str, Any]) -> dict[str, Any]:
    names = ("peak_memory_bytes", "cache_bytes", "cache_allocated_bytes")
    return {name: case[name] for name in names if name in case}


def largest_parts(s: argparse.Namespace, tokens: int) -> dict[str, Any]:
    """Device seconds of a routed pass by operation, the largest first."""
    measured = bench(s, 0.5)
    ids = measured.ids_RT[:1, :tokens].to(DEVICE)
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if ON_GPU else []
    with torch.no_grad(), measured.entered():
        measured.model(input_ids=ids, use_cache=False)
        with torch.profiler.profile(activities=kinds) as profiled:
            measured.model(input_ids=ids, use_cache=False)
    key = "self_device_time_total" if ON_GPU else "self_cpu_time_total"
    entries = sorted(profiled.key_averages(), key=lambda e: -getattr(e, key))
    whole = sum(getattr(e, key) for e in entries) or 1.0
    return {
        "microseconds": whole,
        "largest": [
            {"name": e.key, "share": getattr(e, key) / whole, "calls": e.count}
            for e in entries[:LARGEST]
        ],
    }


def run_phase(name: str, s: argparse.Namespace) -> bool:
    """Measure the cases that are not on file yet, until the time is up; False if one is wrong."""
    file = Path(s.out) / f"{name}.json"
    kept = json.loads(file.read_text()) if file.is_file() else {"cases": {}}
    kept |= {"phase": name, "shape": s.shape, **machine(), "stopped": None}
    began = time.monotonic()
    for case, measure in PHASES[name](s):
        if case in kept["cases"]:
            continue
        if time.monotonic() - began > 60 * s.minutes:
            kept["stopped"] = f"after {s.minutes:g} minutes: run it again to go on"
            break
        kept["cases"][case] = _measured(measure)
        free_memory()
        write_json_atomic(file, kept)
        print(f"{name}: {case}: {_line(kept['cases'][case])}", flush=True)
    write_json_atomic(file, kept)
    memory = "out of memory"  # of a large case: a figure like others
    wrong = [c for c in kept["cases"].values() if c.get("failed", memory) != memory]
    return not wrong and all(case.get("correct", True) for case in kept["cases"].values())


def _measured(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Its figures, or why there are none: one case that fails must not end a run on a lent GPU."""
    try:
        found = attempt(measure)
    except Exception as error:
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
    return {"failed": "out of memory"} if found is None else found


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    name = torch.cuda.get_device_name() if ON_GPU else "CPU, tiny sizes: times mean nothing"
    packages = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"device": name, "packages": packages}


def _line(found: dict[str, Any]) -> str:
    plain = {k: v for k, v in found.items() if isinstance(v, (int, float, str))}
    return ", ".join(
        f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in plain.items()
    )


def main(words: list[str] | None = None) -> int:
    """0 if every kernel equals its reference, 1 if not."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="folder for a JSON file of each phase")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--minutes", type=float, default=8.0, help="of each phase, at most")
    default = "llama3_1_8b_shape" if ON_GPU else "tiny"
    parser.add_argument("--shape", default=default, help="a *_shape of conf/model; " + default)
    gpu_training.add_arguments(parser)
    s = parser.parse_args(words)
    if s.shape != "tiny" and not (ROOT / "conf" / "model" / f"{s.shape}.yaml").is_file():
        parser.error(f"no conf/model/{s.shape}.yaml")
    gpu_training.check_arguments(parser, s)
    fine = [run_phase(name, s) for name in s.phases]
    return 0 if all(fine) else 1


if __name__ == "__main__":
    sys.exit(main())
