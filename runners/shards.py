"""Documents from a folder of Parquet shards, a batch of rows at a time.

Order is that of the shards' names, then of their rows: it depends on neither the number of
processes that read nor on the size of a batch, and no more is read than is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from runners.errors import UserError

ROWS = 256
"""Rows that are in memory at once."""


def shards_of(folder: Path, split: str) -> list[Path]:
    """`<split>.parquet` or `<split>-*.parquet`, as the hub names them, sorted."""
    return sorted([*folder.glob(f"{split}.parquet"), *folder.glob(f"{split}-*.parquet")])


def texts_of(shards: Sequence[Path], text_field: str) -> Iterator[tuple[str, str]]:
    """(name, text) of every row.

    Args:
        text_field: column that holds the text.

    Raises:
        UserError: a file that is no Parquet, a missing column, a value that is no text.
    """
    from pyarrow import ArrowException, parquet

    for shard in shards:
        try:
            file = parquet.ParquetFile(shard)
            if text_field not in file.schema_arrow.names:
                raise UserError(
                    f"{shard} has no column {text_field!r} (data.text_field= names another)"
                )
            number = 0
            for batch in file.iter_batches(batch_size=ROWS, columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    yield f"{shard.stem}-{number}", _checked(text, shard, number)
        except (ArrowException, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"{shard} cannot be read as Parquet: {reason}") from error


def _checked(text: Any, shard: Path, number: int) -> str:
    if not isinstance(text, str):
        raise UserError(f"{shard}, row {number}: no text but a {type(text).__name__}")
    return text
