"""Documents of a data set of the hub, streamed: nothing is downloaded that is not read."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from runners.corpus.files import no_column
from runners.corpus.order import Shard
from runners.errors import UserError


def hub_shards(
    path: str | None, name: str | None, revision: str | None, split: str, text_field: str
) -> list[Shard]:
    """The files that a split consists of, in the hub's order.

    Args:
        path: of the data set (owner/name), or a local folder of one.
        name: configuration; None for the only one.
        revision: branch, tag or commit.
        split: the hub's name of it.

    Raises:
        UserError: no network, no such data set, configuration, split or column.
    """
    rows = _opened(path, name, revision, split, text_field)
    count = rows.num_shards
    return [
        Shard(
            f"{path}-{index:05}-of-{count:05}",
            functools.partial(_texts, rows, index, count, str(path), text_field),
        )
        for index in range(count)
    ]


@functools.lru_cache(maxsize=8)
def _opened(
    path: str | None, name: str | None, revision: str | None, split: str, text_field: str
) -> Any:
    """A split as an iterable, its column found in what describes the data set or its first row."""
    import datasets

    if not path:
        raise UserError("data source 'hub' needs data.path=<owner/name of a data set>")
    with _reached(path):
        found = datasets.load_dataset(
            path, name, revision=revision, streaming=True, trust_remote_code=False
        )
        if split not in found:
            known = ", ".join(map(str, found))
            raise UserError(f"data set {path} has no split {split!r} but {known} (data.splits=)")
        rows = found[split]
        columns = rows.column_names or list(next(iter(rows), {}))
    if text_field not in columns:
        raise UserError(no_column(f"data set {path}", text_field, columns))
    return rows.select_columns([text_field])


def _texts(rows: Any, index: int, count: int, path: str, text_field: str) -> Iterator[str]:
    with _reached(path):
        for number, row in enumerate(rows.shard(num_shards=count, index=index), start=1):
            text = row[text_field]
            if not isinstance(text, str):
                kind = type(text).__name__
                raise UserError(
                    f"data set {path}, shard {index}, row {number}: no text but a {kind}"
                )
            yield text


@contextmanager
def _reached(path: str) -> Iterator[None]:
    """What the libraries below raise (of three packages, no common class) as one line."""
    import datasets

    try:
        yield
    except UserError:
        raise
    except datasets.exceptions.DatasetNotFoundError as error:
        raise UserError(
            f"no data set {path} on the hub: see data.path= and data.revision=, and set HF_TOKEN "
            "if it is private or gated"
        ) from error
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        if "scripts are no longer supported" in reason:
            raise UserError(
                f"data set {path} is a loading script, which is not run: give a copy of it in "
                "Parquet (data.path=, or data.revision=refs/convert/parquet where the hub has "
                "made one), or data.dir=<folder of shards>"
            ) from error
        raise UserError(
            f"cannot read data set {path}: {reason or type(error).__name__} (without a network "
            "set data.dir=<folder of JSON Lines or Parquet>, or HF_HOME to a filled cache)"
        ) from error
