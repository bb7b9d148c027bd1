"""What a routed model does with each token: decisions, forecast errors, growth of the error.

Three Parquet files, tidy: `tokens` (a row a token), `decisions` (a row a token and routed site)
and `depth` (a row a layer).

Shapes: B rows, T tokens of a row, N = B * T, D model width.
"""

from __future__ import annotations

import io
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from methods.base import Decision, Method, Site, UnitView
from methods.engine.decoder.families import layers_of
from methods.engine.decoder.placement import input_device
from methods.engine.observe import observed
from methods.engine.routed import routed
from methods.engine.routing import routing_of
from runners.base_model.load import Base, load_base
from runners.base_model.saved import load_method
from runners.corpus.source import Document, stream_documents
from runners.errors import UserError
from runners.point_config import PointConfig
from runners.store.files import write_bytes_atomic

log = logging.getLogger(__name__)

PROMPT = "prompt"
"""Name of the row that holds the user's text."""
Rows = dict[str, pd.DataFrame]


def record_routing(config: PointConfig) -> Path:
    """Run the saved model of a config over test text and a prompt; write the three files.

    Returns:
        The folder that holds them.
    """
    saved, asked = config.saved, config.inspect
    assert saved is not None and asked is not None
    base = load_base(config.model, config.placement, config.seed, config.store.cache_dir)
    target, trained_on = config.method.target, saved.trained_on_sha256
    named = {"target": target, "trained_on": trained_on}
    method = load_method(saved.saved, base, **named, check_weights=saved.check_weights)
    if not method.sites():
        raise UserError(f"saved={saved.saved} routes nowhere: there is nothing to inspect")
    documents = stream_documents(config.data, "test")
    rows = token_rows(base, documents, tokens=asked.tokens, context=asked.context)
    if asked.prompt:
        rows.append((PROMPT, base.tokenizer(asked.prompt)["input_ids"]))
    folder = Path(asked.out_dir or Path(saved.saved).resolve().parent / "routing")
    tables = routing_tables(base, method, rows)
    for name, table in tables.items():
        buffer = io.BytesIO()
        table.to_parquet(buffer, index=False, compression="zstd")
        write_bytes_atomic(folder / f"{name}.parquet", buffer.getvalue())
    executed = tables["decisions"]["executed"].mean()
    log.info("%d tokens, %.3f executed: %s", len(tables["tokens"]), executed, folder)
    return folder


def token_rows(
    base: Base, documents: Iterable[Document], *, tokens: int, context: int
) -> list[tuple[str, list[int]]]:
    """The first `context` tokens of each document, until there are `tokens`."""
    rows: list[tuple[str, list[int]]] = []
    left = tokens
    for document in documents:
        ids = base.tokenizer(document.text, verbose=False)["input_ids"][: min(context, left)]
        if len(ids) >= 2:
            rows.append((document.name, ids))
            left -= len(ids)
        if left < 2:
            break
    if not rows:
        raise UserError("no text to inspect: every document is shorter than 2 tokens")
    return rows


@torch.no_grad()
def routing_tables(base: Base, method: Method, rows: Sequence[tuple[str, list[int]]]) -> Rows:
    """Dense and routed pass over each row.

    Returns:
        `tokens`: token (running number), row, position, id, text, token_class, frequency (share of
        this id among all tokens here), dense_loss and routed_loss (nats, of predicting this token;
        none for the first of a row).
        `decisions`: token, layer, kind, executed, score, error_l2 and error_cosine: of what a
        bypassed token gets against the unit's true output, on the dense model's inputs, as
        |forecast - output| / |output| and cosine; nothing (a skip) has error 1 and cosine 0.
        `depth`: layer, l2 and cosine of the routed residual stream against the dense one where
        it leaves the layer, means over tokens; first_rms_dense and first_rms_routed, root mean
        square of the stream of a row's first token there (the attention sink), means alike.
    """
    frequency = Counter(token for _, ids in rows for token in ids)
    total = sum(frequency.values())
    tokens, decisions, depths = [], [], []
    first = 0
    for name, ids in rows:
        passes = _passes(base.model, method, ids)
        texts = [str(base.tokenizer.decode([token])) for token in ids]
        tokens.append(
            pd.DataFrame(
                {
                    "token": range(first, first + len(ids)),
                    "row": name,
                    "position": range(len(ids)),
                    "id": ids,
                    "text": texts,
                    "token_class": token_classes(texts),
                    "frequency": [frequency[token] / total for token in ids],
                    "dense_loss": passes["dense_loss"],
                    "routed_loss": passes["routed_loss"],
                }
            )
        )
        for frame in passes["decisions"]:
            decisions.append(frame.assign(token=range(first, first + len(ids))))
        depths.append(passes["depth"].assign(weight=len(ids)))
        first += len(ids)
    table = pd.concat(decisions, ignore_index=True)
    table["kind"] = table["kind"].astype("category")
    return {
        "tokens": pd.concat(tokens, ignore_index=True),
        "decisions": table[["token", *(c for c in table.columns if c != "token")]],
        "depth": _weighted(pd.concat(depths, ignore_index=True)),
    }


def _passes(model: PreTrainedModel, method: Method, ids: Sequence[int]) -> dict[str, Any]:
    """One row through the dense and the routed model."""
    ids_1T = torch.tensor([list(ids)], device=input_device(model))
    errors: dict[Site, tuple[Tensor, Tensor]] = {}
    sites = frozenset(method.sites())

    def visit(view: UnitView) -> None:
        if view.site in sites:
            errors[view.site] = _errors(method, view)

    with observed(model, visit), _residuals(model) as dense_stream:
        dense_loss = _losses(model(input_ids=ids_1T, use_cache=False).logits, ids_1T)
    frames: list[pd.DataFrame] = []

    def observe(site: Site, decision: Decision, _: Tensor) -> None:
        nothing = torch.full_like(decision.scores_BT[0].float(), float("nan"))
        l2, cosine = errors.get(site, (nothing, nothing))
        frames.append(
            pd.DataFrame(
                {
                    "layer": site.layer,
                    "kind": site.kind,
                    "executed": decision.execute_BT[0].cpu().numpy(),
                    "score": decision.scores_BT[0].float().cpu().numpy(),
                    "error_l2": l2.cpu().numpy(),
                    "error_cosine": cosine.cpu().numpy(),
                }
            ).astype({"layer": "int16"})
        )

    with routed(model, method), _residuals(model) as routed_stream:
        routing_of(model).observer = observe
        routed_loss = _losses(model(input_ids=ids_1T, use_cache=False).logits, ids_1T)
    return {
        "dense_loss": dense_loss,
        "routed_loss": routed_loss,
        "decisions": frames,
        "depth": _depth(dense_stream, routed_stream),
    }


def _errors(method: Method, view: UnitView) -> tuple[Tensor, Tensor]:
    """Relative L2 and cosine of the bypass against the unit's output, float32 [N]."""
    y_ND = view.y_ND.float()
    forecast = method.approximate(view.site, view.x_ND)
    if forecast is None:
        return torch.ones(len(y_ND)), torch.zeros(len(y_ND))
    forecast = forecast.float()
    norm = y_ND.norm(dim=-1).clamp_min(1e-12)
    return (forecast - y_ND).norm(dim=-1) / norm, functional.cosine_similarity(forecast, y_ND)


@contextmanager
def _residuals(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Collects the residual stream behind each layer, float32 [N, D]."""
    stream: list[Tensor] = []

    def keep(_: Any, __: Any, out: Any) -> None:
        hidden = out[0] if isinstance(out, tuple) else out
        stream.append(hidden.float().reshape(-1, hidden.shape[-1]))

    hooks = [parts.layer.register_forward_hook(keep) for parts in layers_of(model)]
    try:
        yield stream
    finally:
        for hook in hooks:
            hook.remove()


def _losses(logits_1TV: Tensor, ids_1T: Tensor) -> list[float]:
    """Nats of predicting each token; NaN for the first."""
    losses = functional.cross_entropy(logits_1TV[0, :-1].float(), ids_1T[0, 1:], reduction="none")
    return [float("nan"), *losses.tolist()]


def _depth(dense: Sequence[Tensor], routed_stream: Sequence[Tensor]) -> pd.DataFrame:
    rows = []
    for layer, (true, own) in enumerate(zip(dense, routed_stream, strict=True)):
        l2 = (own - true).norm(dim=-1) / true.norm(dim=-1).clamp_min(1e-12)
        cosine = functional.cosine_similarity(own, true)
        row = {"layer": layer, "l2": float(l2.mean()), "cosine": float(cosine.mean())}
        first = (("first_rms_dense", true[0]), ("first_rms_routed", own[0]))
        rows.append(row | {name: float(x_D.square().mean().sqrt()) for name, x_D in first})
    return pd.DataFrame(rows)


def _weighted(depths: pd.DataFrame) -> pd.DataFrame:
    """Mean over rows, each weighted by its tokens."""
    means = [str(column) for column in depths if column not in ("layer", "weight")]
    scaled = depths.assign(**{c: depths[c] * depths["weight"] for c in means})
    sums = scaled.groupby("layer", as_index=False)[[*means, "weight"]].sum()
    sums[means] = sums[means].div(sums["weight"], axis=0)
    return sums.drop(columns="weight")


CLASSES = ("function", "content", "name", "continuation", "number", "punctuation", "space")
FUNCTION_WORDS = frozenset(
    "a an the this that these those i you he she it we they me him her us them my your his its "
    "our their who whom whose which what and or but nor so yet if then else because as while "
    "when where of in on at by for with about against between into through during before after "
    "above below to from up down out off over under again further is am are was were be been "
    "being have has had do does did will would shall should can could may might must not no "
    "than too very there here all any both each few more most other some such only own same how "
    "why".split()
)


def token_classes(texts: Sequence[str]) -> list[str]:
    """Class of each token of a row, in order.

    A token without a space before it that follows a letter continues a word; a capital letter in
    the middle of a sentence makes a name; the function words are a closed list.

    Args:
        texts: each token decoded by itself, spaces kept.
    """
    classes: list[str] = []
    before, sentence_start = "", True
    for text in texts:
        word = text.strip()
        joined = bool(before) and before[-1].isalnum() and text[:1].isalnum()
        if not word:
            classes.append("space")
        elif any(c.isdigit() for c in word):
            classes.append("number")
        elif not any(c.isalpha() for c in word):
            classes.append("punctuation")
        elif joined:
            classes.append("continuation")
        elif word.lower() in FUNCTION_WORDS:
            classes.append("function")
        elif word[0].isupper() and not sentence_start:
            classes.append("name")
        else:
            classes.append("content")
        if word:
            sentence_start = word[-1] in ".!?"
        before = text
    return classes
