"""The results store as tidy data frames; the only place that knows the record's layout.

Read of `<results_dir>/<fingerprint>/result.json`, where `?` may be missing in older records:
`schema_version`, `status`, `reason?`, `evaluated?`, `method`, `variant?`, `model`, `data?`, `seed`,
`sparsity_target`, `sparsity_realised`, `flops_ratio`, `kv_bytes_ratio?`, `kv_policy?`,
`added_parameters?`, `options?`, `seconds?`, `realised?.per_layer[].{layer attention mlp}`,
`perplexity.*.{value low high dense documents? metric?}`,
`accuracy.*.{value stderr dense n chance? metric? margin? margin_stderr?
dense_margin? sparsity_realised? shared_contexts?}`,
`generation?.{settings kept prefix sparsity_realised gallery}`,
`stages[].{name seconds tokens steps peak_memory_bytes figures?}`,
`speed?.{prefill decode settings}` (see `Store.speed`) and `identity` (see `groups.content`).
Beside it: `config.yaml`, `items.parquet?` and `routing?/`.

Over 500 lines: one table of the record after another, so that no other file has to know a key.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow
from pyarrow import parquet

from analysis import groups
from analysis.groups import Record
from analysis.intervals import Interval, accuracy_difference, perplexity_ratio, ratio_of_sums

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
DENSE = "dense"
SERIES = ["setting", "model", "data", "budget", "method", "variant", "line", "true_error", "role"]
"""What makes a line of a picture; `setting` tells the pictures apart."""
POINT = [*SERIES, "sparsity_target"]
"""What makes a point of a line: its records are of one content and differ in their seed."""
MEASURE = ["measure", "name", "metric", "shown"]
VALUES = ["value", "low", "high"]
"""A measure and its interval; of a perplexity, averaged as losses."""
RATIO = ["ratio", "ratio_low", "ratio_high"]
"""A perplexity over the dense model's on the same documents, with its 95 % interval."""
DIFFERENCE = ["difference", "difference_low", "difference_high"]
"""An accuracy less the dense model's on the same items, with its 95 % interval."""
GENERATION = "generation"
"""Measure of greedy decoding: the share of dense's continuation that is kept."""
MARGIN = "margin"
"""Measure of choices: log-likelihood of the right one less the best other's, nats; in tables, not
in pictures."""
TRUE_ERROR = "true error"
"""Said of a method that decides by what no method can know, in every table and picture."""
SAME_DENSE = 1e-3
"""Dense perplexities of one text that are further apart (relative) are of two models or texts."""
HOW = "decisions trained steps device dtype threads kernels graphs neighbours".split()
"""How speed was measured; figures that differ in one of these are never mixed."""
TIMED = "batch dense_tps routed_tps speedup_p20 speedup_p80 bound sparsity".split()


class AnalysisError(ValueError):
    """A mistake of the user; its text is one line."""


class Store:
    """The complete points of a results folder, and frames of their figures.

    Every frame has the columns of `points` beside its own. Records that are not complete are named
    in the log and in `left_out`.

    Raises:
        AnalysisError: no record is complete, or all are of another schema, or points of one
            setting have different dense models.
    """

    def __init__(self, results_dir: Path) -> None:
        self.results_dir = results_dir
        self.records: list[Record] = []
        self.left_out: list[tuple[Path, str]] = []
        for path in sorted(results_dir.glob("*/result.json")):
            try:
                self.records.append(_read(path))
            except AnalysisError as error:
                self.left_out.append((path, str(error)))
                log.warning("left out %s: %s", path, error)
        if not self.records:
            why = " ({}: {})".format(*self.left_out[0]) if self.left_out else ""
            raise AnalysisError(f"no complete result in {results_dir}{why}")
        names = [str(record["identity"]["fingerprint"]) for record in self.records]
        self.configs = {name: groups.read_config(results_dir / name) for name in names}
        self.points = _points(self.records, self.configs)
        self._check_dense()

    def _check_dense(self) -> None:
        if self.measures.empty:
            return
        texts = self.measures[self.measures["measure"] == "perplexity"]
        for (_, name), own in texts.groupby(["setting", "name"]):
            low, *_, high = (
                own.sort_values("dense")[["dense", "fingerprint"]].to_numpy().tolist() * 2
            )
            if high[0] > low[0] * (1 + SAME_DENSE):
                raise AnalysisError(
                    f"the dense perplexity of {name} is {low[0]:.4f} in {low[1]} and {high[0]:.4f} "
                    f"in {high[1]}, whose configurations agree: one is of other weights or text; "
                    "remove it, or run it again with force=true"
                )

    def _beside(self, places: Sequence[int], own: pd.DataFrame) -> pd.DataFrame:
        """Rows with the columns of their points, which are at these places."""
        if own.empty:
            return pd.DataFrame()
        keys = self.points.iloc[list(places)].reset_index(drop=True)
        return pd.concat([keys, own.reset_index(drop=True)], axis="columns")

    def _frame(self, rows: Callable[[Record], Iterator[dict[str, Any]]]) -> pd.DataFrame:
        found = [(place, row) for place, record in enumerate(self.records) for row in rows(record)]
        return self._beside([place for place, _ in found], pd.DataFrame([row for _, row in found]))

    @cached_property
    def measures(self) -> pd.DataFrame:
        """One row per point and measure.

        `measure` (perplexity | accuracy | generation | margin, see `GENERATION` and `MARGIN`),
        `name`, `metric`, `shown` (both for a reader), `value`, `realised_here` (sparsity of the
        tokens that were read for it: with `shared_contexts` a context once for all choices),
        `low`, `high` (the 95 % interval of a perplexity alone, one standard error of an
        accuracy), `dense`, `chance`, `n`, and what the same documents and items say against the
        dense model: `RATIO` of perplexities, `DIFFERENCE` of accuracies, whose intervals are
        missing where no items were saved.
        """
        return _beside_dense(self._frame(_measures), self.items, ["fingerprint"])

    @cached_property
    def averaged(self) -> pd.DataFrame:
        """Measures averaged over seeds; with several seeds `low` and `high` are mean -/+ std.

        `RATIO` and `DIFFERENCE` are of the mean of the seeds; their intervals are over documents
        and items alone, of these trained models.
        """
        columns = ["sparsity_realised", "flops_ratio", "kv_bytes_ratio", "training_s"]
        columns += ["tokens_read", "chance", "realised_here"]
        means = self.over_seeds(self.measures, MEASURE, [*columns, *VALUES, "dense"])
        return _beside_dense(means, self.items, POINT)

    def over_seeds(
        self, frame: pd.DataFrame, by: Sequence[str], columns: Sequence[str]
    ) -> pd.DataFrame:
        """Average columns over the seeds of each point.

        Of perplexities the losses are averaged: a mean of perplexities is that of the worst seed
        where seeds are orders apart.

        Returns:
            the columns of `POINT`, `by` and `columns`, `seeds` and `fingerprints`.
        """
        if frame.empty:
            return frame
        own = _mapped(frame, np.log).groupby([*POINT, *by], dropna=False)
        means = own[list(columns)].mean()
        if "low" in columns:
            one, spread = own["seed"].nunique() == 1, own["value"].std()
            means["low"] = means["low"].where(one, means["value"] - spread)
            means["high"] = means["high"].where(one, means["value"] + spread)
        made_of = self.points.groupby(POINT).agg(
            seeds=("seed", "nunique"), fingerprints=("fingerprint", joined)
        )
        return _mapped(means.reset_index(), np.exp).merge(made_of.reset_index(), on=POINT)

    def ratios(self, rows: pd.DataFrame, others: pd.DataFrame) -> np.ndarray:
        """Divide perplexities of `averaged` by others, place by place: [rows, value, low, high].

        Both of a place have one text; the interval, over documents, is missing without them.
        """
        by = [*POINT, "name"]
        found = np.column_stack([rows["value"].to_numpy() / others["value"].to_numpy()] * 3)
        found[:, 1:] = np.nan
        if self.items.empty:
            return found
        texts = self.items[self.items["measure"] == "perplexity"]
        documents = dict(_item_means(texts, by))
        keys = [frame[by].itertuples(index=False, name=None) for frame in (rows, others)]
        for place, (one, other) in enumerate(zip(*keys, strict=True)):
            if one in documents and other in documents:
                both = documents[one].join(documents[other], rsuffix="_other", how="inner")
                sums = both[["value", "value_other", "weight"]].to_numpy().T
                found[place] = perplexity_ratio(*sums)[:3]
        return found

    def with_option(self, *names: str) -> pd.DataFrame:
        """Perplexities averaged over seeds with options of their method, None where it has none."""
        if self.averaged.empty:
            return self.averaged.reindex(columns=["method", *names])
        own = [record.get("options") or {} for record in self.records]
        chosen = self.points[["setting", "line"]].copy()
        for name in names:
            chosen[name] = [options.get(name) for options in own]
        chosen = chosen.drop_duplicates(["setting", "line"])
        perplexities = self.averaged[self.averaged["measure"] == "perplexity"]
        return perplexities.merge(chosen, on=["setting", "line"])

    @cached_property
    def items(self) -> pd.DataFrame:
        """One row per point and item of its tasks, texts and prompts; empty where none was saved.

        `measure`, `name`, `metric`, `shown`, `item` (equal for the same item in all points),
        `value` (right or wrong; nll in nats), `weight`, `dense`.
        """
        tables, places = [], []
        for place, name in enumerate(self.points["fingerprint"]):
            path = self.results_dir / name / "items.parquet"
            if path.is_file():
                tables.append(parquet.ParquetFile(path).read(use_threads=False))
                places += [place] * len(tables[-1])
        for place, record in enumerate(self.records):
            if found := _prompts(record):
                tables.append(pyarrow.Table.from_pylist(found))
                places += [place] * len(found)
        if not tables:
            return pd.DataFrame()
        own = pyarrow.concat_tables(tables, promote_options="permissive").to_pandas()
        own.loc[own["measure"] == "perplexity", "metric"] = "perplexity"  # stored as nll
        pairs = zip(own["name"], own["metric"], strict=True)
        own["shown"] = [_shown(name, metric) for name, metric in pairs]
        return self._beside(places, own)

    @cached_property
    def gallery(self) -> pd.DataFrame:
        """One row per point and prompt of its gallery.

        `prompt` at `place`, `text` and what the dense model wrote (`dense`), `kept` and `prefix`
        (see `runners/evaluation/generation.py`) with their standard errors `kept_stderr` and
        `prefix_stderr`, of `n` prompts of test text.
        """
        return self._frame(_gallery)

    @cached_property
    def stages(self) -> pd.DataFrame:
        """One row per point and stage: seconds, tokens, steps, peak bytes, figures, `cached`."""
        return self._frame(_stages)

    @cached_property
    def speed(self) -> pd.DataFrame:
        """One row per point and timed case.

        `phase` (prefill | decode), `tokens` (of the prompt, or in the cache), `batch`, those of
        `HOW`, `dense_tps`, `routed_tps`, `speedup` (their ratio, so that the three agree) with
        `speedup_p20` and `speedup_p80` (of single pairs), `bound`, `efficiency`, `sparsity`
        (realised on what was timed), bytes of `peak` memory and `kv` (keys and values; decode)
        with `dense_peak` and `dense_kv`.
        """
        frame = self._frame(_speed)
        if len(frame):
            frame.loc[frame["decisions"] == "random", "line"] += " [random decisions]"
        return frame

    @cached_property
    def layers(self) -> pd.DataFrame:
        """One row per point, layer and unit kind: realised sparsity there (`sparsity`)."""
        parts = [
            [] if _flops_only(record) else (record.get("realised") or {}).get("per_layer") or []
            for record in self.records
        ]
        rows = [
            (place, entry["layer"], kind, entry[kind])
            for place, part in enumerate(parts)
            for entry in part
            for kind in ("attention", "mlp")
        ]  # tuples: a store of thousands of points has hundreds of thousands
        own = pd.DataFrame(rows, columns=["place", "layer", "kind", "sparsity"])
        return self._beside(own.pop("place").tolist(), own)


def _read(path: Path) -> Record:
    """Read a record.

    Raises:
        AnalysisError: says why it is left out.
    """
    try:
        record: Record = json.loads(path.read_bytes())
        version, status = record["schema_version"], record["status"]
    except (ValueError, KeyError, TypeError) as error:
        raise AnalysisError("not a result record") from error
    if version != SCHEMA_VERSION:
        raise AnalysisError(f"schema {version}, this code reads {SCHEMA_VERSION}")
    if status != "complete":
        raise AnalysisError(f"{status}: {record.get('reason', 'no reason given')}")
    return record


def _points(records: Sequence[Record], configs: Mapping[str, groups.Flat]) -> pd.DataFrame:
    """One row per point: its picture and line, what it is, realised sparsity and cost."""
    frame = pd.DataFrame([_point(record) for record in records])
    made = zip(records, frame["fingerprint"], strict=True)
    settings, lines = zip(*(groups.content(r, configs[name]) for r, name in made), strict=True)
    names = [" · ".join(map(str, words)) for words in frame[["model", "data", "budget"]].to_numpy()]
    told = groups.told_apart(names, settings)
    frame["setting"] = [" · ".join(filter(None, words)) for words in zip(names, told, strict=True)]
    frame["line"] = _lines(frame, lines)
    # a seed twice in one content: saved models of two trainings were scored, not two seeds of one
    twins = frame.duplicated(["setting", "line", "sparsity_target", "seed"])
    marks = zip(lines, frame["fingerprint"], frame["line"], strict=True)
    doubled = set(frame.loc[twins, "line"])
    lines = tuple(c | {"fingerprint": name} if line in doubled else c for c, name, line in marks)
    return frame.assign(line=_lines(frame, lines))


def _lines(frame: pd.DataFrame, contents: Sequence[groups.Flat]) -> list[str]:
    keys = list(zip(frame["setting"], frame["method"], frame["variant"], strict=True))
    errors = [TRUE_ERROR if marked else "" for marked in frame["true_error"]]
    told = groups.told_apart(keys, contents)
    return [
        DENSE if method == DENSE else groups.label(method, error, variant, words)
        for (_, method, variant), error, words in zip(keys, errors, told, strict=True)
    ]


def _point(record: Record) -> dict[str, Any]:
    identity = record["identity"]
    return {
        "model": record["model"],
        "data": record.get("data") or "text",
        "budget": identity["budget"],
        "method": record["method"],
        "variant": record.get("variant") or "",
        "true_error": bool(identity.get("upper_bound")),
        "role": _role(identity),
        "seed": record["seed"],
        "sparsity_target": record["sparsity_target"],
        "sparsity_realised": np.nan if _flops_only(record) else record["sparsity_realised"],
        "flops_ratio": record["flops_ratio"],
        "kv_bytes_ratio": record.get("kv_bytes_ratio", 1.0),
        "kv_policy": record.get("kv_policy", "keep"),
        "added_parameters": record.get("added_parameters"),
        "training_s": sum(stage["seconds"] for stage in record["stages"]),
        "tokens_read": sum(stage["tokens"] for stage in record["stages"]),
        "fingerprint": str(identity["fingerprint"]),
    }


def _flops_only(record: Record) -> bool:
    """True of a method whose sparsity is none in the sense of the others."""
    return bool(record["identity"].get("flops_only"))


def _role(identity: Record) -> str:
    """What a method is, in the words of `style.ROLES`."""
    if identity.get("upper_bound"):
        return "by the true error"
    if identity.get("flops_only"):
        return "FLOPs only"
    return "all tokens alike" if identity.get("static") else "routes each token"


def _measures(record: Record) -> Iterator[dict[str, Any]]:
    for name, entry in record["perplexity"].items():
        row = _measure("perplexity", name, entry)
        ends = {end: np.nan if entry[end] is None else entry[end] for end in ("low", "high")}
        yield row | ends | {"n": entry.get("documents")}
    for name, entry in record["accuracy"].items():
        yield from _of_items(_measure("accuracy", name, entry), entry["stderr"], entry["n"])
        if "margin" in entry:
            figures = {"value": entry["margin"], "dense": entry["dense_margin"]}
            row = _measure(MARGIN, name, {"metric": MARGIN, **figures})
            yield from _of_items(row, entry["margin_stderr"], entry["n"])

    if "generation" in record:
        entry = record["generation"]["kept"]
        row = _measure(GENERATION, "kept", {**entry, **_kept(record)})
        yield from _of_items(row, entry["stderr"], entry["n"])


def _kept(record: Record) -> dict[str, Any]:
    generation = record["generation"]
    here = {"sparsity_realised": generation["sparsity_realised"]}
    return {"metric": f"{generation['settings']['new_tokens']} tokens kept", **here}


def _prompts(record: Record) -> list[dict[str, Any]]:
    """The prompts of a record as `items`; those of one place are equal in all points."""
    if "generation" not in record:
        return []
    named = {"measure": GENERATION, "name": "kept", "metric": _kept(record)["metric"]}
    shares = record["generation"]["kept"]["per_prompt"]
    return [
        {**named, "item": f"prompt {place}", "value": value, "weight": 1.0, "dense": 1.0}
        for place, value in enumerate(shares)
    ]


def _gallery(record: Record) -> Iterator[dict[str, Any]]:
    generation = record.get("generation") or {"gallery": []}
    for place, entry in enumerate(generation["gallery"]):
        row = {"place": place, **entry, "n": generation["kept"]["n"]}
        for name in ("kept", "prefix"):
            row |= {name: generation[name]["value"], f"{name}_stderr": generation[name]["stderr"]}
        yield row


def _of_items(row: dict[str, Any], stderr: float | None, n: int) -> Iterator[dict[str, Any]]:
    half = stderr or 0.0
    yield row | {"low": row["value"] - half, "high": row["value"] + half, "n": n}


def _measure(measure: str, name: str, entry: Record) -> dict[str, Any]:
    metric = str(entry.get("metric") or measure)
    return {
        "measure": measure,
        "name": name,
        "metric": metric,
        "shown": _shown(name, metric),
        "value": entry["value"],
        "dense": entry["dense"],
        "chance": entry.get("chance", np.nan),
        "realised_here": entry.get("sparsity_realised", np.nan),
        "shared_contexts": entry.get("shared_contexts"),
    }


def _beside_dense(measures: pd.DataFrame, items: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Add `RATIO` and `DIFFERENCE`; of each group the items' values are averaged over seeds."""
    if measures.empty:
        return measures
    found = [
        dict(zip([*by, "measure", "name"], [*key], strict=True)) | _interval(key[-2], own)
        for key, own in _item_means(items, [*by, "measure", "name"])
    ]
    ends = [*RATIO[1:], *DIFFERENCE[1:]]
    beside = pd.DataFrame(found, columns=[*by, "measure", "name", *ends])
    beside = beside.astype(dict.fromkeys(ends, float))
    own = measures.merge(beside, on=[*by, "measure", "name"], how="left")
    perplexity = own["measure"] == "perplexity"
    own["ratio"] = (own["value"] / own["dense"]).where(perplexity)
    own["difference"] = (own["value"] - own["dense"]).where(~perplexity)
    itself = own["method"] == DENSE  # is no second model whose items could differ
    for value, *ends in (RATIO, DIFFERENCE):
        own.loc[itself, ends] = own.loc[itself, [value, value]].to_numpy()
    return own


def _item_means(items: pd.DataFrame, by: list[str]) -> Iterator[tuple[Any, pd.DataFrame]]:
    """Give the key of each group, and its items averaged over seeds."""
    if items.empty:
        return iter(())
    group = items.groupby(by, dropna=False, sort=False).ngroup().rename("group")
    means = items.groupby([group, "item"])[["value", "dense", "weight"]].mean().dropna()
    names = items[by].itertuples(index=False, name=None)
    keys: dict[Any, Any] = dict(zip(group, names, strict=True))
    return (
        (keys[place], own.droplevel("group")) for place, own in means.groupby("group", sort=False)
    )


def _interval(measure: str, items: pd.DataFrame) -> dict[str, float]:
    """Compare the items of one task or text with the dense model's."""
    value, dense, weight = items[["value", "dense", "weight"]].to_numpy().T
    if measure == "perplexity":
        return _ends(RATIO, perplexity_ratio(value, dense, weight))
    if measure == GENERATION:
        return _ends(DIFFERENCE, ratio_of_sums(value - dense, weight))
    return _ends(DIFFERENCE, accuracy_difference(value, dense))


def _ends(names: list[str], found: Interval) -> dict[str, float]:
    return {names[1]: found.low, names[2]: found.high}


def _shown(name: Any, metric: Any) -> str:
    if str(metric).endswith("tokens kept"):
        return str(metric)
    return f"{name} {str(metric).replace('_perplexity', ' perplexity')}"


def _stages(record: Record) -> Iterator[dict[str, Any]]:
    for order, stage in enumerate(record["stages"]):
        plain = {key: value for key, value in stage.items() if key not in ("name", "figures")}
        yield {"order": order, "stage": stage["name"], **plain, **(stage.get("figures") or {})}


def _speed(record: Record) -> Iterator[dict[str, Any]]:
    measured = record.get("speed") or {}
    for phase, length in (("prefill", "seq"), ("decode", "context")):
        for case in measured.get(phase, []):
            # older records say it once for all cases, and none of them had company
            how = {"neighbours": 0, **(measured.get("settings") or {}), **case}
            speedup = case["routed_tps"] / case["dense_tps"]
            yield {
                "phase": phase,
                "tokens": case[length],
                **{key: str(how.get(key, "")) for key in HOW},
                **{key: case[key] for key in TIMED},
                **_bytes(case, "peak_memory_bytes", "peak"),
                **_bytes(case, "cache_bytes", "kv"),
                "speedup": speedup,
                "efficiency": speedup / case["bound"],
            }


def _bytes(case: Record, key: str, name: str) -> dict[str, Any]:
    """Of the routed model under the name, of the dense one under `dense_` and the name."""
    both = case.get(key) or {}
    return {name: both.get("routed", np.nan), f"dense_{name}": both.get("dense", np.nan)}


def _mapped(frame: pd.DataFrame, to: Callable[[Any], Any]) -> pd.DataFrame:
    """Perplexities to nats per token, which may be averaged, or back."""
    if "measure" not in frame:
        return frame
    changed, rows = frame.copy(), frame["measure"] == "perplexity"
    changed.loc[rows, VALUES] = to(frame.loc[rows, VALUES].astype(float))
    return changed


def only_one(rows: pd.DataFrame, by: Sequence[str]) -> None:
    """Refuse rows that a table would take for one although more than `by` differs.

    Raises:
        AnalysisError: names the lines and their fingerprints.
    """
    for _, own in rows[rows.duplicated(list(by), keep=False)].groupby(list(by), dropna=False):
        pairs = zip(own["line"], own["fingerprints"], strict=True)
        said = "; ".join(f"{line}: {fingerprints}" for line, fingerprints in pairs)
        raise AnalysisError(f"points of one cell differ in more than it says ({said})")


def joined(fingerprints: pd.Series) -> str:
    """Put the fingerprints behind a row into one cell."""
    return " ".join(sorted({word for cell in fingerprints for word in str(cell).split()}))


def by_setting(frame: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Give (slug for a file name, title, rows) of each setting whose points share a picture."""
    for setting, part in frame.groupby("setting") if len(frame) else ():
        words = str(setting).replace(" · ", "-")
        slug = "".join(c if c.isalnum() or c in "-_.=" else "_" for c in words)
        if len(slug) > 100:  # of the name of a file, which may have 255 bytes
            slug = f"{slug[:91]}-{hashlib.sha256(words.encode()).hexdigest()[:8]}"
        yield slug, str(setting), part
