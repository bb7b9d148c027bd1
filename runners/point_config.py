"""Parse a resolved config once into frozen dataclasses, one per section.

Every part of `runners` is handed its own section and never the whole. A wrong type, a value out of
range, an unknown choice or an unknown key is refused here, from the type hints alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

from annotated_types import Ge, Gt, Lt
from pydantic import ConfigDict, TypeAdapter

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
"""Nothing is converted: `no` is a string and no boolean, 1.5 is no whole number."""

Positive = Annotated[int, Ge(1)]
Natural = Annotated[int, Ge(0)]
Share = Annotated[float, Ge(0), Lt(1)]
T = TypeVar("T")
Backend = Literal["off", "wandb", "tensorboard"]


@dataclass(frozen=True)
class ModelConfig:
    """What is routed: a file of conf/model."""

    __pydantic_config__ = STRICT
    name: str
    source: Literal["embedded", "pretrained", "tiny", "shape"]
    path: str
    """Hub id or folder; the family's `model_type` where weights are drawn."""
    revision: str | None = None
    trust_remote_code: bool = False
    config: Mapping[str, Any] | None = None
    """Sizes of a model of `shape`, in the words of its Hugging Face config."""


@dataclass(frozen=True)
class DataConfig:
    """Text for fitting, calibration and test: a file of conf/data."""

    __pydantic_config__ = STRICT
    name: str | None = None
    source: Literal["sotu", "files", "hub"] = "sotu"
    dir: str | None = None
    """Folder with `<split>.<ending>` or shards `<split>-*.<ending>`; read whatever the source."""
    text_field: str = "text"
    path: str | None = None
    config_name: str | None = None
    revision: str | None = None
    splits: Mapping[str, str] | None = field(default=None, hash=False)
    """The hub's name of each of our splits; one that has train's gets its part of it."""
    documents_limit: Positive | None = None
    shuffle_buffer: Natural = 1000
    """Documents that the next one is drawn from; 0 keeps the files' order."""

    @property
    def kind(self) -> Literal["sotu", "files", "hub"]:
        """Where text is read: a folder that is given goes before the source."""
        return self.source if self.dir is None else "files"


@dataclass(frozen=True)
class StageConfig:
    """What one gradient stage may spend."""

    __pydantic_config__ = STRICT
    steps: Positive
    batch_size: Positive
    seq_len: Positive
    accumulate: Positive

    @property
    def tokens(self) -> int:
        """Tokens that the stage reads in all."""
        return self.steps * self.accumulate * self.batch_size * self.seq_len


@dataclass(frozen=True)
class BudgetConfig:
    """Steps and tokens of every stage: a file of conf/budget."""

    __pydantic_config__ = STRICT
    name: str
    seq_len: Positive
    fit_tokens: Positive
    calibration_tokens: Positive
    sensitivity_tokens: Positive
    forecasters: StageConfig
    routers: StageConfig
    lora: StageConfig


@dataclass(frozen=True)
class PerplexityConfig:
    """Perplexity of the test documents, each by itself."""

    __pydantic_config__ = STRICT
    documents_limit: Positive | None
    tokens_per_document: Positive
    context: Positive
    """Tokens that a prediction may look back on."""
    stride: Positive
    batch_size: Positive
    bootstrap_samples: Positive


@dataclass(frozen=True)
class TokenPerplexityConfig:
    """Perplexity of a text whose documents are joined."""

    __pydantic_config__ = STRICT
    tokens: Positive | None
    context: Positive
    stride: Positive
    batch_size: Positive
    bootstrap_samples: Positive


@dataclass(frozen=True)
class LongContextConfig:
    """Perplexity of one text at several contexts."""

    __pydantic_config__ = STRICT
    text: str
    contexts: tuple[Positive, ...]
    stride: Positive
    tokens: Positive | None


@dataclass(frozen=True)
class EvalConfig:
    """Perplexity and tasks: a file of conf/eval."""

    __pydantic_config__ = STRICT
    name: str
    perplexity: PerplexityConfig
    texts: tuple[str, ...]
    token_perplexity: TokenPerplexityConfig
    long_context: LongContextConfig | None
    tasks: tuple[str, ...]
    limit: Positive | None
    batch_size: Positive | Literal["auto"]
    num_fewshot: Mapping[str, Natural]
    chat_template: bool
    data_dir: str | None
    log_samples: bool
    share_contexts: bool | None


@dataclass(frozen=True)
class PrefillConfig:
    """Cases of prefill to time: every pair of the two lists."""

    __pydantic_config__ = STRICT
    tokens: tuple[Positive, ...]
    batch_sizes: tuple[Positive, ...]


@dataclass(frozen=True)
class DecodeConfig:
    """Cases of decode to time: every pair of the two lists."""

    __pydantic_config__ = STRICT
    context: tuple[Positive, ...]
    batch_sizes: tuple[Positive, ...]
    steps: Positive


@dataclass(frozen=True)
class SpeedConfig:
    """What `runners/speed.py` times: a file of conf/speed."""

    __pydantic_config__ = STRICT
    name: str
    decisions: Literal["real", "random"]
    trained: bool
    kernels: Literal["auto", "compiled", "triton", "torch"]
    graphs: Literal["auto", True, False]
    warmup: Natural | None
    repeats: Positive | None
    prefill: PrefillConfig
    decode: DecodeConfig


@dataclass(frozen=True)
class TrackingConfig:
    """Where a run is mirrored: a file of conf/tracking."""

    __pydantic_config__ = STRICT
    backend: Backend
    mode: Literal["offline", "online"] = "offline"
    project: str = "routebench"
    entity: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()
    dir: str = "outputs"
    init_timeout_s: Annotated[float, Gt(0)] = 60
    finish_timeout_s: Annotated[float, Gt(0)] = 120


@dataclass(frozen=True)
class MethodConfig:
    """Who decides: a file of conf/method."""

    name: str
    target: str
    """Dotted name of the method's class."""
    options: Mapping[str, Any]
    """Constructor arguments but `sparsity`."""


@dataclass(frozen=True)
class PlacementConfig:
    """Where and in which precision the model lies."""

    __pydantic_config__ = STRICT
    device: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    device_map: str | Mapping[str, str | int] | None
    max_memory: Mapping[str | int, str | int] | None


@dataclass(frozen=True)
class StoreConfig:
    """Where results are kept, and when a point is computed again."""

    __pydantic_config__ = STRICT
    results_dir: str
    cache_dir: str | None
    force: bool
    retry_failed: bool
    checkpoint_seconds: Annotated[float, Ge(0)] | None = None


@dataclass(frozen=True)
class SavedConfig:
    """A saved routed model to evaluate, and what it was trained on."""

    __pydantic_config__ = STRICT
    saved: str
    base_model: str | None
    recalibrate: bool
    saved_sha256: str
    trained_on_sha256: str


@dataclass(frozen=True)
class PointConfig:
    """One point: a method at one target on one model and text."""

    __pydantic_config__ = STRICT
    method: MethodConfig
    model: ModelConfig
    data: DataConfig
    budget: BudgetConfig
    eval: EvalConfig
    tracking: TrackingConfig
    placement: PlacementConfig
    store: StoreConfig
    sparsity: Share
    seed: Natural
    objective: Literal["lm", "distill"]
    mode: Literal["masked", "gathered"]
    merge_lora: bool
    speed: SpeedConfig | None = None
    saved: SavedConfig | None = None

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> PointConfig:
        """Check a resolved config (the flat form of conf/sweep.yaml) and give its sections.

        Raises:
            pydantic.ValidationError: what is wrong, and where.
        """
        sections = dict(config)
        own = dict(sections.pop("method"))
        sections["method"] = {"name": own.pop("name"), "target": own.pop("_target_")}
        sections["method"]["options"] = own
        for name, section in GROUPED.items():
            keys = section.__dataclass_fields__
            if name != "saved" or "saved" in sections:
                sections[name] = {key: sections.pop(key) for key in keys if key in sections}
        text = json.dumps(sections)
        return TypeAdapter(cls).validate_json(text)


def parse_section(section: type[T], raw: Mapping[str, Any]) -> T:
    """Check one section by itself.

    Raises:
        pydantic.ValidationError: what is wrong, and where.
    """
    return TypeAdapter(section).validate_json(json.dumps(raw))


GROUPED: Mapping[str, Any] = {
    "placement": PlacementConfig,
    "store": StoreConfig,
    "saved": SavedConfig,
}
"""Sections whose keys lie at the top of conf/sweep.yaml."""
