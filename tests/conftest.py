"""The real configs, shrunk to a tiny model, for every test."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from runners.base_model.load import Base, load_base
from runners.base_model.synthetic import byte_tokenizer, tiny_model
from runners.corpus.source import Document
from runners.options import parse_section
from runners.point_config import EvalConfig, PointConfig
from tests.nursery import Nursery, Step

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
SHRUNK = (
    "model=tiny",
    "dtype=float32",
    "++data.documents_limit=4",
    "budget.seq_len=32",
    "budget.fit_tokens=512",
    "budget.calibration_tokens=512",
    "budget.sensitivity_tokens=64",
    "budget.forecasters={steps:3,batch_size:2,seq_len:16,accumulate:1}",
    "budget.routers={steps:3,batch_size:2,seq_len:32,accumulate:1}",
    "budget.lora={steps:3,batch_size:2,seq_len:32,accumulate:1}",
    "eval.perplexity.tokens_per_document=48",
    "eval.perplexity.documents_limit=4",
    "eval.tasks=[]",
    "eval.limit=8",
    "eval.generation={prompts:3,prompt_tokens:8,new_tokens:4,gallery:[In peace]}",
)
"""Overrides that make a point of `conf/sweep.yaml` run in about a second."""


def compose_tiny(*overrides: str, config_name: str = "sweep") -> dict[str, Any]:
    """A resolved real config on the tiny model, with a tiny budget and no tracking."""
    return copy.deepcopy(_composed(config_name, *overrides))


@cache
def _composed(config_name: str, *overrides: str) -> dict[str, Any]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(config_name, overrides=[*SHRUNK, "tracking=off", *overrides])
    resolved = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def eval_config(**changes: Any) -> EvalConfig:
    """conf/eval/quick.yaml without tasks, and with these values."""
    quick = yaml.safe_load((CONF / "eval" / "quick.yaml").read_text())
    return parse_section(EvalConfig, {**quick, "tasks": [], **changes})


@pytest.fixture
def tiny_config(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`compose_tiny` whose results and cache are in this test's folder."""

    def make(*overrides: str) -> dict[str, Any]:
        folders = (f"results_dir={tmp_path / 'results'}", f"cache_dir={tmp_path / 'cache'}")
        return compose_tiny(*folders, *overrides)

    return make


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return byte_tokenizer()


@pytest.fixture
def tiny_llama() -> PreTrainedModel:
    """Frozen random Llama, 4 layers of width 64, bytes as tokens."""
    model, _ = tiny_model(family="llama", seed=3)
    frozen: PreTrainedModel = model.eval().requires_grad_(False)
    return frozen


@pytest.fixture(autouse=True)
def _random_state() -> Iterator[None]:
    """No test sees the generator of another."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(autouse=True, scope="session")
def _clean_clone() -> Iterator[None]:
    """No test leaves the folders of W&B or Hydra in the clone."""
    folders = [ROOT / name for name in ("wandb", "outputs", "multirun")]
    before = [folder for folder in folders if folder.exists()]
    yield
    assert [folder for folder in folders if folder.exists()] == before


def token_rows(rows: int, tokens: int, *, seed: int = 0) -> torch.Tensor:
    """Ids of the byte vocabulary without the special tokens, int64 [rows, tokens]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 250, (rows, tokens), generator=generator)


WORDS = "the people of this union met in peace and spoke about labor trade law and duty".split()


def documents(number: int, *, words: int = 80, first: int = 0) -> list[Document]:
    """Texts that all differ, at least four bytes a word."""
    texts = []
    for index in range(first, first + number):
        picked = (WORDS[(index * 7 + i * (index + 3)) % len(WORDS)] for i in range(words))
        texts.append(Document(f"doc-{index}", " ".join(f"{w}{index}" for w in picked)))
    return texts


@dataclass(frozen=True)
class Finished:
    """What a command left behind."""

    code: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def error_lines(self) -> list[str]:
        return self.stderr.splitlines()


HANGS_S = 600
"""After which a command counts as hanging; a busy machine runs the longest in a third of it."""


class Commands:
    """Runs `runners/<script>.py` in an empty folder, as a user would.

    With a `nursery` in a fork of a process that has imported everything, which takes seconds off
    each run; without one in a process of its own.
    """

    def __init__(
        self, folder: Path, results: Path, cache: Path, nursery: Nursery | None = None
    ) -> None:
        self.folder, self.results, self.cache, self.nursery = folder, results, cache, nursery

    def line(self, script: str, *words: str, shrink: bool = True) -> list[str]:
        """The command; `shrink` adds the tiny model and budget (not for score's own config)."""
        shrunk = [w for w in SHRUNK if script != "score" or not w.startswith("model=")]
        places = [f"results_dir={self.results}", f"cache_dir={self.cache}"]
        places += ["report=false"] if script != "score" else []
        fixed = [*shrunk, "tracking=off", *places] if shrink else []
        return [sys.executable, str(ROOT / "runners" / f"{script}.py"), *fixed, *words]

    def environment(self, **extra: str) -> dict[str, str]:
        """One thread, this repository importable, no hub."""
        own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        return {**os.environ, **own, **extra}

    def run(self, script: str, *words: str, shrink: bool = True, **env: str) -> Finished:
        began = time.perf_counter()
        line, environment = self.line(script, *words, shrink=shrink), self.environment(**env)
        if self.nursery is not None:
            step = Step(line[2:], script, folder=str(self.folder), env=environment)
            run = self.nursery.run(step)
            code, stdout, stderr = run.code(), run.stdout, run.stderr
        else:
            done = subprocess.run(
                line,
                cwd=self.folder,
                env=environment,
                capture_output=True,
                text=True,
                timeout=HANGS_S,
            )
            code, stdout, stderr = done.returncode, done.stdout, done.stderr
        return Finished(code, stdout, stderr, time.perf_counter() - began)

    def start(self, script: str, *words: str) -> subprocess.Popen[bytes]:
        """The same in the background, its output thrown away."""
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        command = self.line(script, *words)
        return subprocess.Popen(command, cwd=self.folder, env=self.environment(), **quiet)


@pytest.fixture(scope="session")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """Starts runs quickly."""
    running = Nursery(tmp_path_factory.mktemp("nursery"))
    yield running
    running.close()


@pytest.fixture
def commands(tmp_path: Path, nursery: Nursery) -> Commands:
    """What most tests of a command need: its code, output and files."""
    return Commands(tmp_path, tmp_path / "results", tmp_path / "cache", nursery)


@pytest.fixture
def shell(tmp_path: Path) -> Commands:
    """Each command in a process of its own, for tests of processes and of how soon they end."""
    return Commands(tmp_path, tmp_path / "results", tmp_path / "cache")


def base_of(config: dict[str, Any]) -> Base:
    """The base model of a resolved config."""
    point = PointConfig.parse(config)
    return load_base(point.model, point.placement, point.seed, point.store.cache_dir)
