"""Read the texts of a local file, whatever its format, a part at a time.

A mistake is said with its file and line, and no column's type is guessed from a sample.
"""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from runners.errors import UserError

log = logging.getLogger(__name__)

READ_ROWS, READ_BYTES = 256, 2**20
"""Of a Parquet column that are decoded, and read, at once."""
LONGEST = 2**22
"""Characters of a document that are used; a tokenizer takes 235 bytes of memory a token."""
TEXT_PART = 2**15
"""Characters after which a plain text goes on, at its next line, as another document: a book is
read in parts, of which calibration and test get theirs."""
BETWEEN = re.compile(r"[\s,]*")
"""What stands between the values of a JSON file."""
NAMES = 16
"""More letters than JSON's longest word: an error so near the end may be of a word cut in two."""

Rows = Iterator[tuple[str, Any]]
"""Where a text stands, as a message says it, and what stands there."""


def texts_of(file: Path, text_field: str, *others: str) -> Iterator[str]:
    """Read the text of every row of a local file.

    Args:
        text_field: column, or field of each JSON object, that holds the text; plain text has none.
        others: fields that are taken where a JSON object has not the first.

    Raises:
        UserError: a broken file, a missing column, a line or a value that is no text.
    """
    from pyarrow import ArrowException

    form, rows = FORMATS[ending_of(file).split(".")[1]]
    try:
        for where, value in rows(file, text_field, *others):
            yield checked_text(value, where)
    except (ArrowException, OSError, EOFError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file} cannot be read as {form}: {reason}") from error


def ending_of(file: Path) -> str:
    """What of a file's name tells how it is read, `.jsonl.gz`; empty if nothing does."""
    return next((ending for ending in ENDINGS if file.name.endswith(ending)), "")


def require_column(text_field: str, columns: Iterable[str], where: str) -> None:
    """Refuse what has no such column, with the names of those that there are."""
    if text_field not in columns:
        names = ", ".join(map(repr, columns)) or "none"
        raise UserError(
            f"{where} has no column {text_field!r} but {names} (data.text_field= names another)"
        )


def checked_text(value: Any, where: str) -> str:
    """What a tokenizer can read: of a very long text the beginning, which is said."""
    if not isinstance(value, str):
        raise UserError(f"{where} holds no text but a {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half a pair, which JSON can write and UTF-8 cannot
        raise UserError(f"{where} holds no Unicode text ({error.reason})") from error
    if len(value) > LONGEST:
        log.warning("%s: of %d characters the first %d are read", where, len(value), LONGEST)
    return value[:LONGEST]


def _parquet(file: Path, text_field: str, *_: str) -> Rows:
    """Row group by row group, and of these the text's column only."""
    from pyarrow import parquet

    opened = parquet.ParquetFile(file, buffer_size=READ_BYTES, pre_buffer=False)
    require_column(text_field, opened.schema_arrow.names, str(file))
    number = itertools.count(1)
    for group in range(opened.num_row_groups):
        for batch in opened.iter_batches(READ_ROWS, row_groups=[group], columns=[text_field]):
            yield from ((f"{file}, row {next(number)}", v) for v in batch.column(0).to_pylist())


def _json_lines(file: Path, *fields: str) -> Rows:
    """An object on every line that is not blank."""
    with _opened(file) as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{file}, line {number}"
            try:
                row = json.loads(line) if line.strip() else None
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where}: no JSON ({error})") from error
            if line.strip():
                yield where, _field(row, fields, where)


def _json(file: Path, *fields: str) -> Rows:
    """An array of objects, or one object after the other, as either is called `.json`."""
    decode, pieces = json.JSONDecoder().raw_decode, (piece for _, piece in _decoded(file, 2**16))
    held, at, line, inside = "", 0, 1, False
    while True:
        start = BETWEEN.match(held, at).end()  # type: ignore[union-attr]
        line += held.count("\n", at, start)
        at = start
        if held[at : at + 1] == ("]" if inside else "["):
            inside, at = not inside, at + 1
            continue
        try:
            value, end = decode(held, at)
        except (ValueError, RecursionError) as error:
            pos, reason = getattr(error, "pos", at), getattr(error, "msg", str(error))
            cut = pos > len(held) - NAMES or reason.startswith("Unterminated string")
            # twice as much each time, so that a long object is not parsed once a line
            more = _at_least(len(held) - at, pieces) if cut and len(held) < 16 * LONGEST else ""
            if more:
                held, at = held[at:] + more, 0
            elif at < len(held):
                line += held.count("\n", at, pos)
                raise UserError(f"{file}, line {line}: no JSON ({reason})") from error
            elif inside:
                raise UserError(f"{file}, line {line}: no JSON (the array has no end)") from error
            else:
                return
            continue
        where = f"{file}, line {line}"
        yield where, _field(value, fields, where)
        line += held.count("\n", at, end)
        at = end


def _at_least(characters: int, pieces: Iterator[str]) -> str:
    found = []
    for piece in pieces:
        found.append(piece)
        characters -= len(piece)
        if characters <= 0:
            break
    return "".join(found)


def _field(row: Any, fields: tuple[str, ...], where: str) -> Any:
    if not isinstance(row, dict):
        raise UserError(f"{where}: no JSON object with a field {fields[0]!r}")
    found = next((name for name in fields if name in row), fields[0])
    require_column(found, row, where)
    return row[found]


def _csv(file: Path, text_field: str, *_: str) -> Rows:
    """Commas and double quotes; the first line names the columns."""
    csv.field_size_limit(4 * LONGEST)
    rows = csv.reader((line for _, line in _decoded(file, 4 * LONGEST)), strict=True)
    columns: list[str] = []
    while True:
        where = f"{file}, line {rows.line_num + 1}"
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise UserError(f"{where}: no CSV ({error})") from error
        if row is None:
            return
        if not columns:
            columns = row
            if columns:
                require_column(text_field, columns, where)
        elif len(row) not in (0, len(columns)):
            # most often a comma in a text without quotes, whose rest would be lost in silence
            raise UserError(
                f"{where}: no CSV ({len(row)} columns, {len(columns)} in the first line)"
            )
        elif row:
            yield where, row[columns.index(text_field)]


def _plain(file: Path, *_: str) -> Rows:
    """The whole file is one text; a long one is cut at the ends of lines."""
    held, size, first = [], 0, 1
    for number, piece in _decoded(file, TEXT_PART):
        held.append(piece)
        size += len(piece)
        if size >= TEXT_PART:
            yield f"{file}, line {first}", "".join(held)
            held, size, first = [], 0, number + 1
    if held:
        yield f"{file}, line {first}", "".join(held)


def _opened(file: Path) -> io.BufferedReader:
    """Bytes of a file that may be compressed, as its ending tells."""
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(file))  # type: ignore[arg-type]


def _decoded(file: Path, longest: int) -> Iterator[tuple[int, str]]:
    """Lines with their number, one of more than `longest` bytes in parts."""
    decoder, number = codecs.getincrementaldecoder("utf-8-sig")(), 1
    with _opened(file) as lines:
        while True:
            piece = lines.readline(longest)
            try:
                yield number, decoder.decode(piece, final=not piece)
            except UnicodeDecodeError as error:
                where = f"{file}, line {number}"
                raise UserError(f"{where} is no UTF-8 text ({error.reason})") from error
            if not piece:
                return
            number += piece.endswith(b"\n")


FORMATS: Mapping[str, tuple[str, Callable[..., Rows]]] = {
    "txt": ("text", _plain),
    "jsonl": ("JSON Lines", _json_lines),
    "json": ("JSON", _json),
    "csv": ("CSV", _csv),
    "parquet": ("Parquet", _parquet),
}
"""By the ending of a file: what a message calls it, and what reads it."""
PACKED = ("gz", "bz2", "zst")
ENDINGS = (
    *(f".{form}" for form in FORMATS),
    *(f".{form}.{packed}" for form in FORMATS if form != "parquet" for packed in PACKED),
)
