"""Documents from local files, JSON Lines or Parquet, of any size: a few rows at a time."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runners.corpus.order import Shard
from runners.errors import UserError

ENDINGS = ("parquet", "jsonl", "jsonl.gz", "jsonl.zst")
ROWS = 256
"""Rows of a Parquet row group that are decoded at once."""
READ_BYTES = 2**20
"""Of a column that are read at once."""


def files_of(folder: Path, split: str) -> list[Path]:
    """`<split>.<ending>` and `<split>-*.<ending>`, as the hub names them, by name."""
    patterns = [f"{split}{rest}.{ending}" for rest in ("", "-*") for ending in ENDINGS]
    return sorted({file for pattern in patterns for file in folder.glob(pattern)})


def shards_of(folder: Path, split: str, text_field: str) -> list[Shard]:
    """The files of a split; none of them is opened yet."""
    return [
        Shard(_stem(file), functools.partial(texts_of, file, text_field))
        for file in files_of(folder, split)
    ]


def texts_of(file: Path, text_field: str) -> Iterator[str]:
    """The text of every row.

    Args:
        text_field: column, or field of each line's JSON object, that holds the text.

    Raises:
        UserError: a broken file, a missing column, a line or a value that is no text.
    """
    return (_parquet if file.suffix == ".parquet" else _json_lines)(file, text_field)


def check_files(folder: Path, splits: Sequence[str], text_field: str) -> None:
    """Open the files that there are, as far as to see that they have the column.

    Raises:
        UserError: no training text, a broken file, no such column.
    """
    if not files_of(folder, "train"):
        raise UserError(no_files(folder, "train"))
    for split in splits:
        for file in files_of(folder, split):
            status = file.stat()
            _check(file, text_field, status.st_mtime_ns, status.st_size)


def no_files(folder: Path, split: str) -> str:
    """What to say of a folder without a split."""
    endings = ", ".join(ENDINGS)
    return f"data.dir={folder} holds no {split}.jsonl and no shards {split}-*.* ({endings})"


@functools.lru_cache(maxsize=4096)
def _check(file: Path, text_field: str, *version: int) -> None:
    if file.suffix == ".parquet":
        with _readable(file, "Parquet"):
            _open_parquet(file, text_field).close()
    else:
        next(_json_lines(file, text_field), None)


def _parquet(file: Path, text_field: str) -> Iterator[str]:
    """Row group by row group, and of these the text's column only."""
    number = 0
    with _readable(file, "Parquet"):
        opened = _open_parquet(file, text_field)
        for group in range(opened.num_row_groups):
            batches = opened.iter_batches(ROWS, row_groups=[group], columns=[text_field])
            for batch in batches:
                for text in batch.column(0).to_pylist():
                    number += 1
                    if not isinstance(text, str):
                        kind = type(text).__name__
                        raise UserError(f"{file}, row {number}: no text but a {kind}")
                    yield text


def _open_parquet(file: Path, text_field: str) -> Any:
    """The file with its schema read and looked at."""
    from pyarrow import parquet, types

    opened = parquet.ParquetFile(file, buffer_size=READ_BYTES, pre_buffer=False)
    schema = opened.schema_arrow
    if text_field not in schema.names:
        raise UserError(no_column(str(file), text_field, schema.names))
    kind = schema.field(text_field).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
        raise UserError(f"{file}: column {text_field!r} holds {kind}, no text")
    return opened


def no_column(where: str, text_field: str, columns: Sequence[str]) -> str:
    """What to say of a table without the text's column."""
    names = ", ".join(map(repr, columns)) or "none"
    return f"{where} has no column {text_field!r} but {names} (data.text_field= names another)"


def _json_lines(file: Path, text_field: str) -> Iterator[str]:
    """Line by line, whether the file is compressed or not."""
    import pyarrow

    with (
        _readable(file, "JSON Lines"),
        io.BufferedReader(pyarrow.input_stream(file)) as lines,  # type: ignore[arg-type]
    ):
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _text_of(line, text_field, f"{file}, line {number}")


def _text_of(line: bytes, text_field: str, where: str) -> str:
    """The text of one line of JSON."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: no JSON ({error})") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: no JSON object with a field {text_field!r}")
    if text_field not in row:
        raise UserError(no_column(where, text_field, list(row)))
    text = row[text_field]
    if not isinstance(text, str):
        raise UserError(f"{where}: field {text_field!r} holds no text but a {type(text).__name__}")
    return text


@contextmanager
def _readable(file: Path, form: str) -> Iterator[None]:
    """What the libraries say of a broken file, in one line that names it."""
    from pyarrow import ArrowException

    try:
        yield
    except (ArrowException, OSError, EOFError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file} cannot be read as {form}: {reason}") from error


def _stem(file: Path) -> str:
    return file.name.removesuffix(next(f".{e}" for e in ENDINGS if file.name.endswith(f".{e}")))
